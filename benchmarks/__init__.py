"""Timings against other implementations: ratios within one process (docs/protocol.md)."""
