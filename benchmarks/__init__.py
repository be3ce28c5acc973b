"""Side-by-side timings (PROTOCOL 8). Run one with `python -m benchmarks.NAME`, all with `make bench`."""
