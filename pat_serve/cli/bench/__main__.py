"""pat-bench for `python -m pat_serve.cli.bench`."""

from pat_serve.cli.bench import main

main()
