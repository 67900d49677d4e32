"""The ablation of PAT's options on a small base over real text: `python -m benchmarks.ablation --help`."""
