"""What scripts/benchmark.py measures; imported by that script and by tests only."""
