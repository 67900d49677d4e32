"""Quality against speed at several ratios, with seeds: `python -m benchmarks.study --help`."""
