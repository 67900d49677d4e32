"""Train, export and measure every method at every ratio; what is finished is not repeated.

Example: `python -m benchmarks.study --out study/ --data TEXTS`

Without --data it reads the interpreter's documentation alone. Every line of results.jsonl is one checkpoint; the table
and the curve are made from it, at any time, by --table.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.exported import train_and_export
from benchmarks.study import measuring, report
from benchmarks.study.corpus import build
from benchmarks.study.methods import DENSE, METHODS, RATIOS, SWEEP_RATIOS, SWEEPS, settings
from pat_serve.demo.base_model import BaseSettings, train_base
from pat_serve.hardware import describe

BASE = "the base, untuned"
# Widths and layers; the first is what an hour on two cores holds.
SIZES = {
    "tiny": BaseSettings(
        hidden_size=128, intermediate_size=352, layers=3, heads=4, kv_heads=2, batch_size=16, steps=400
    ),
    "small": BaseSettings(batch_size=16, steps=900),
    "large": BaseSettings(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        layers=12,
        heads=12,
        kv_heads=4,
        batch_size=32,
        steps=4000,
    ),
}


def main(
    out: Annotated[Path, typer.Option(help="Base, data and results; finished results are not repeated.")],
    data: Annotated[Path | None, typer.Option(help="Folder with wikitext2.{valid,test}.txt and eval/*.json.")] = None,
    size: Annotated[str, typer.Option(help=f"Of the base: {', '.join(SIZES)}.")] = "small",
    seeds: Annotated[int, typer.Option(help="Runs of each method at each ratio.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 150,
    only: Annotated[list[str] | None, typer.Option(help="Methods whose name contains this.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help=f"Beside the curve: {', '.join(SWEEPS)}.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin no run after so many seconds.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of what is there.")] = False,
) -> None:
    """Quality against speed at 12.5, 25, 37.5 and 50 %, with spreads over seeds."""
    results, began = out / "results.jsonl", time.monotonic()
    if not table:
        _prepare(out, data, SIZES[size])
        done = {(line["method"], line["ratio"], line["seed"], line["steps"]) for line in report.read(results)}
        if (BASE, 0.0, 0, steps) not in done:
            _keep({"method": BASE, "ratio": 0.0, "seed": 0, "steps": steps} | _figures(out, out / "base"), results)
        for name, ratio, seed, method in _jobs(seeds, sweep or []):
            if (only and not any(part in name for part in only)) or (name, ratio, seed, steps) in done:
                continue
            if seconds is not None and time.monotonic() - began > seconds:
                print(f"stopped after {seconds:g} s; call again to go on")
                break
            _keep(_run(out, name, method, ratio, seed, steps, SIZES[size].hidden_size), results)
    lines = [line for line in report.read(results) if line["steps"] == steps]
    print(report.table(lines))
    report.write_curve(lines, out / "curve.html")


def _jobs(seeds: int, sweeps: list[str]) -> list[tuple[str, float, int, dict[str, Any]]]:
    """Seed after seed, so that whatever is finished early is a whole curve."""
    jobs: list[tuple[str, float, int, dict[str, Any]]] = []
    for seed in range(seeds):
        jobs.append((DENSE, 0.0, seed, {}))
        jobs += [(name, ratio, seed, method) for ratio in RATIOS for name, method in METHODS.items()]
        jobs += [
            (name, ratio, seed, method)
            for sweep in sweeps
            for ratio in SWEEP_RATIOS[sweep]
            for name, method in SWEEPS[sweep].items()
        ]
    return jobs


def _prepare(out: Path, data: Path | None, base: BaseSettings) -> None:
    if not (out / "base").exists():
        corpus = build(data)
        corpus.save(out / "data")
        train_base(corpus.base_texts, out / "base", base)


def _run(
    out: Path, name: str, method: dict[str, Any], ratio: float, seed: int, steps: int, base_width: int
) -> dict[str, Any]:
    width = None if name == DENSE else round(base_width * (1 - ratio))
    inputs = {"model": str(out / "base"), "data": str(out / "data" / "tune.jsonl"), "max_steps": steps, "seed": seed}
    run, pruned = out / "run", out / ("dense" if name == DENSE else "pruned")
    exported = train_and_export(settings(name, method, width) | inputs, name, run, pruned)
    line = {
        "method": name,
        "ratio": ratio,
        "seed": seed,
        "steps": steps,
        **exported,
        **_figures(out, pruned),
        **measuring.polarisation(run),
        "machine": describe(),
    }
    if name != DENSE:
        line |= measuring.speedup(out / "dense", pruned)
    return line


def _figures(out: Path, model: Path) -> dict[str, float]:
    return measuring.quality(model, out / "data")


def _keep(line: dict[str, Any], results: Path) -> None:
    shown = {key: value for key, value in line.items() if key != "machine"}
    print(json.dumps(shown), flush=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
