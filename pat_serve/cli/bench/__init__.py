"""pat-bench: measure what pruning gained. Each command has one file."""

from __future__ import annotations

from pat_serve.cli.app import new_app, run_app
from pat_serve.cli.bench.compare import compare
from pat_serve.cli.bench.equal_memory import equal_memory
from pat_serve.cli.bench.load import load
from pat_serve.cli.bench.measure import latency, throughput
from pat_serve.cli.bench.plan import plan
from pat_serve.cli.bench.speculative import speculative
from pat_serve.cli.bench.speedup import speedup

app = new_app()


@app.callback()
def bench() -> None:
    """Measure checkpoints and servers, compare them, and check claims about them.

    Example: `pat-bench speedup --baseline dense/ --candidate pruned/ --claim 1.33`
    """


for command in (speedup, latency, throughput, load, equal_memory, speculative, compare, plan):
    app.command()(command)


def main() -> None:
    """Run the command line of `pat-bench`, to the end of the process."""
    run_app(app)
