"""What adapters, merges and training to merge are worth on real tasks: `python -m benchmarks.results`."""
