"""Benchmarks and evaluation; imported as `prune.evals`."""
