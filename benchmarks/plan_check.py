"""Compare `pat-bench plan` with a measured run: one engine, its grid, then a server under Poisson load.

Example: python -m benchmarks.plan_check --out plan-check.json

A random model large enough that a step takes tens of milliseconds. Its grid is measured by `pat-bench latency` on one
core, since `pat-serve` leaves the engine one core less than there are; then `pat-serve` serves it and `pat-bench load`
sends Poisson traffic at some rates. One simulated engine under the same traffic stands beside what was measured, once
with arrivals of its own and once with the very arrivals that the client made, which leaves the model of the engine as
the only difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.serving_process import KEY, serving
from pat_serve.machine.hardware import describe
from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.bench.load.result import LoadResult, LoadRun
from pat_serve.server.bench.planning.records import read_measured
from pat_serve.server.bench.planning.search import EDGE, capacity_per_s
from pat_serve.server.bench.planning.simulation import Engine, simulate
from pat_serve.server.bench.planning.steps import StepTimes
from pat_serve.server.bench.planning.traffic import Arrival, crossed, poisson
from tests.tiny_models import save_tiny_llama

BENCH = "from pat_serve.cli.bench import main; main()"
FIGURES = [(name, q) for name in ("ttft", "tpot") for q in (50, 90)]


def main() -> None:
    """Measure, simulate, print both side by side, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for model and records; what is there is not made again")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="of each cell of the grid")
    parser.add_argument("--shares", default="0.3,0.6", help="rates, as shares of the simulated capacity")
    parser.add_argument("--seconds", type=float, default=60, help="of each rate")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = check(options.work or Path(scratch), options)
    figures |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe()}
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def check(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Do the whole comparison, with its files in a folder."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    if not model.exists():
        wide = {"hidden_size": options.hidden, "intermediate_size": options.hidden * 11 // 4}
        heads = {"num_attention_heads": options.hidden // 64, "num_key_value_heads": options.hidden // 64}
        save_tiny_llama(model, **wide, **heads, head_dim=64, num_hidden_layers=options.layers)
    lengths = ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
    grid = work / "latency.json"
    if not grid.exists():
        latency = [
            "latency",
            "--model",
            str(model),
            "--batch-size",
            options.batches,
            *lengths,
            "--rounds",
            str(options.rounds),
        ]
        bench([*latency, "--no-roofline", "--out", str(grid)], core=max(os.sched_getaffinity(0)))
    measured = read_measured([grid], role="baseline")
    times = StepTimes(measured.cells, name=measured.name)
    engine = Engine(times=times, max_batch=times.largest_batch, max_step_tokens=2048, kv_tokens=None)
    mix = crossed([(options.prompt_tokens, 1.0)], [(options.output_tokens, 1.0)])
    capacity = capacity_per_s(engine, mix, requests=1000, seed=0)
    rates = [round(capacity * float(share), 2) for share in options.shares.split(",")]
    print(f"simulated capacity {capacity:.2f} requests/s; rates {rates}", flush=True)
    loads = work / "load.json"
    if not loads.exists():
        flags = ["--max-num-seqs", str(times.largest_batch), "--no-enable-prefix-caching"]
        served = serving(
            "pat-serve",
            model,
            work / "serve.log",
            vllm_flags=flags,
            flags=["--dtype", "float32", "--kv-cache-gib", "1"],
        )
        with served as server:
            load = ["load", "--url", f"http://127.0.0.1:{server.port}", "--rate", ",".join(map(str, rates)), *lengths]
            bench([*load, "--tokenizer", str(model), "--seconds", str(options.seconds), "--out", str(loads)])
    result = LoadResult.model_validate_json(loads.read_text(encoding="utf-8"))
    return {
        "capacity_per_s": capacity,
        "cells": [vars(cell) for cell in measured.cells],
        "rates": [side_by_side(run, engine, options) for run in result.runs],
    }


def side_by_side(run: LoadRun, engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """One rate's figures: measured, simulated with arrivals of its own, simulated with the client's arrivals."""
    rate = run.rate or run.requests_per_s
    mix = crossed([(options.prompt_tokens, 1.0)], [(options.output_tokens, 1.0)])
    many = simulate(poisson(mix, rate_per_s=rate, requests=4000, seed=0), engine, replicas=1, dispatch="round-robin")
    many = many[int(len(many) * EDGE) : int(len(many) * (1 - EDGE))]
    sent = sorted(one.sent_s for one in run.requests if one.first_token_s is not None)
    prompt, output = options.prompt_tokens, options.output_tokens
    same = simulate(
        [Arrival(at_s=at_s - sent[0], prompt_tokens=prompt, output_tokens=output) for at_s in sent],
        engine,
        replicas=1,
        dispatch="round-robin",
    )
    columns: dict[str, dict[str, float]] = {"measured": {}, "simulated": {}, "same arrivals": {}}
    completed = [one.latencies_s for one in run.requests if one.outcome == "completed"]
    for name, q in FIGURES:
        key = f"{name} p{q}"
        columns["measured"][key] = percentile([one[name] for one in completed], q)
        columns["simulated"][key] = percentile([one.latencies_s[name] for one in many], q)
        columns["same arrivals"][key] = percentile([one.latencies_s[name] for one in same], q)
    columns["measured"]["requests/s"] = run.requests_per_s
    columns["simulated"]["requests/s"] = (len(many) - 1) / (many[-1].last_token_s - many[0].last_token_s)
    ends_s = sorted(one.last_token_s for one in same)
    columns["same arrivals"]["requests/s"] = len(same) / ends_s[-1]
    print(f"\n{run.name}: {run.completed} completed, client kept its schedule: {run.kept_schedule}")
    print(f"{'':12}" + "".join(f"{name:>24}" for name in columns))
    for key, value in columns["measured"].items():
        scale, unit = (1000, "ms") if key != "requests/s" else (1, "/s")
        line = f"{key:12}{value * scale:18.2f} {unit:5}"
        for other in ("simulated", "same arrivals"):
            line += f"{columns[other][key] * scale:12.2f} ({columns[other][key] / value - 1:+5.0%})   "
        print(line, flush=True)
    return {"name": run.name, "completed": run.completed, "kept_schedule": run.kept_schedule, "figures": columns}


def bench(arguments: list[str], *, core: int | None = None) -> None:
    """Run pat-bench, on one core if one is named."""
    command = ["taskset", "-c", str(core)] if core is not None else []
    command += [sys.executable, "-c", BENCH, *arguments]
    done = subprocess.run(command, env=os.environ | {"PAT_BENCH_API_KEY": KEY}, check=False)
    if done.returncode:
        raise SystemExit(f"pat-bench {arguments[0]} ended with {done.returncode}")


if __name__ == "__main__":
    main()
