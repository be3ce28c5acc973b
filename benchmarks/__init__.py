"""Timings against other implementations, measured alternately in one process (docs/performance.md)."""
