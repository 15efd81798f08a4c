"""Benchmarks of jaxbn and other libraries: `python -m tests.bench --help`."""
