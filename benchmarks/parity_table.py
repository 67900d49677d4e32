"""A table of parity figures, family by dtype, in Markdown.

Example: python -m benchmarks.parity_table --out parity.md

Each base is a small random model, each run a random plan and a random adapter, far from where training starts; nothing
is downloaded. --depths adds Llamas of so many layers, --runs finished runs (of pretrained models, say). With --vllm
an engine starts for each line and each dtype that is computed in.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pat_serve.export.exporter import export_run
from pat_serve.export.parity.comparison import (
    EXACT,
    EXPORTED,
    RANDOM,
    TRAINED,
    TRANSFORMERS,
    VLLM,
    Comparison,
    Parity,
)
from pat_serve.machine.hardware import describe
from pat_serve.server.engine.workers.scoring import score_with_vllm
from tests.random_runs import random_run
from tests.test_families import BASES
from tests.tiny_models import save_tiny_family

DTYPES = ("float32", "bfloat16", "float16")
HIDDEN, WIDTH, LAYERS = 128, 96, 4


def main() -> None:
    """Measure every line of the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(BASES), help="lines of the table, all by default")
    parser.add_argument("--depths", nargs="*", type=int, default=[], help="layers of more lines, of the first base")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="finished runs, a line each")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--vllm", action="store_true", help="measure in vLLM too")
    parser.add_argument("--out", type=Path, help="write the table to a file as well")
    options = parser.parse_args()
    lines = [*_heading(), *_header(options.vllm)]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in _runs(options, Path(scratch)):
            for dtype in options.dtypes:
                line = _line(name, dtype, _measure(run, dtype, options.vllm), options.vllm)
                lines.append(line)
                print(line, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _runs(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    lines = [(name, name, LAYERS) for name in options.families]
    lines += [(f"{next(iter(BASES))}, {depth} layers", next(iter(BASES)), depth) for depth in options.depths]
    for title, name, layers in lines:
        model_type, settings = BASES[name]
        settings = {**settings, "hidden_size": HIDDEN, "head_dim": 32, "num_hidden_layers": layers}
        base = save_tiny_family(scratch / title / "base", model_type, **settings)
        yield title, random_run(scratch / title / "run", base, width=WIDTH)
    yield from ((run.name, run) for run in options.runs)


def _measure(run: Path, dtype: str, vllm: bool) -> Parity:
    with tempfile.TemporaryDirectory() as scratch:
        done = export_run(run, Path(scratch) / "out", dtype=dtype, scorer=score_with_vllm if vllm else None)
    assert done.parity is not None
    return done.parity


def _heading() -> list[str]:
    machine = describe()
    flags = machine["cpu_flags"]
    assert isinstance(flags, list)
    where = f"{machine['cpu_model']} ({machine['cpu_cores']} cores, {', '.join(flags)})"
    date = datetime.now(UTC).date().isoformat()
    return [
        f"{date}, {where}, torch {machine['torch']}, vllm {machine['vllm']};",
        f"random bases have {LAYERS} layers if no other number is given, hidden {HIDDEN} to {WIDTH}. Every cell: max",
        "difference / std, mean KL and median KL in nats, equal top-1.",
        "",
    ]


def _header(vllm: bool) -> list[str]:
    columns = [
        "base",
        "files",
        "rewriting",
        "rounded at random",
        "files, float32",
        "trained, own dtype",
        "files, own dtype",
    ]
    columns += ["vLLM, float32", "vLLM, own dtype"] if vllm else []
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _line(name: str, dtype: str, parity: Parity, vllm: bool) -> str:
    exact = "float64" if any((row.model, row.dtype) == (EXACT, "float64") for row in parity.comparisons) else "float32"
    wanted = [(EXACT, TRANSFORMERS, exact), (RANDOM, TRANSFORMERS, "float32"), (EXPORTED, TRANSFORMERS, "float32")]
    wanted += [(TRAINED, TRANSFORMERS, dtype), (EXPORTED, TRANSFORMERS, dtype if dtype != "float32" else "")]
    wanted += [(EXPORTED, VLLM, "float32"), (EXPORTED, VLLM, dtype if dtype != "float32" else "")] if vllm else []
    found = {(c.model, c.runtime, c.dtype): _cell(c) for c in parity.comparisons}
    return f"| {name} | {dtype} | {' | '.join(found.get(key, '') for key in wanted)} |"


def _cell(comparison: Comparison) -> str:
    figures = comparison.figures
    mark = "" if comparison.passed else " **fail**"
    kl = f"{figures.mean_kl_nats:.0e}, {figures.median_kl_nats:.0e}"
    dtype = " (float64)" if comparison.dtype == "float64" else ""
    return f"{figures.max_abs_over_std:.1e}, {kl}, {figures.top1_agreement:.1%}{dtype}{mark}"


if __name__ == "__main__":
    main()
