"""The project's own benchmarks: `python -m benchmarks.run`."""
