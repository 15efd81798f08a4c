"""Benchmarks of jaxbn beside its peers: `python -m tests.bench --help`."""
