"""The version, apart so that setup.py reads it without importing JAX."""

__version__ = "0.2.0"
