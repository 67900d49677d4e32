"""Divide a decode step's time: matrices, attention, the rest of torch, and everything that is not torch.

Example: python -m benchmarks.decode_profile --layers 2 --steps 48 --turns 3 --out profile.json

One vLLM engine a process, in the environment of pat-bench's own; the models take turns, each turn a new engine. Steps
are timed with the profiler off, then profiled; a kind's time is the sum of its operators' own times. "between" is
the rest of a step: scheduling, input preparation, Python, the profiler itself. The ratio of a kind is the narrower
model's gain in it; the ceiling holds for the products alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pat_serve.machine.hardware import DTYPE_BYTES, describe, serving_dtype
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.engine.workers.process import worker_environment
from pat_serve.shapes.sizes import decode_bytes

KINDS = ("products", "attention", "other operators", "between")
_PRODUCTS = ("mm", "linear", "matmul", "gemm", "onednn", "mkldnn")
_ATTENTION = ("attention", "attn", "paged", "reshape_and_cache", "kv_cache")
_WARMUP_STEPS = 4


def main() -> None:
    """Measure both models in turns, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="llama2-7b", help="shipped shape or folder")
    parser.add_argument("--candidate", default="llama2-7b-pat25")
    parser.add_argument("--layers", type=int, default=2, help="of either; random weights")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=48, help="of each turn, timed; as many again are profiled")
    parser.add_argument("--turns", type=int, default=3, help="engines of each model")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.child.write_text(json.dumps(profile_here(options)), encoding="utf-8")
        return
    models = (options.baseline, options.candidate)
    turns: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.turns):
            for model in models if number % 2 == 0 else reversed(models):
                turns[model].append(one_turn(options, model, Path(scratch)))
                print(f"{model}: {turns[model][-1]['step_s'] * 1e3:.2f} ms a step", flush=True)
    figures = {"machine": describe(), "date": datetime.now(UTC).date().isoformat(), "turns": turns}
    print(table(turns, options))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def one_turn(options: argparse.Namespace, model: str, scratch: Path) -> dict[str, Any]:
    """A model's engine in a process of its own."""
    found = scratch / "turn.json"
    command = [sys.executable, "-m", "benchmarks.decode_profile", "--child", str(found), "--baseline", model]
    for name in ("layers", "prompt_tokens", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = worker_environment(os.environ, scratch=scratch, offline=True)
    with (scratch / "log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{model} failed; its last words:\n{(scratch / 'log').read_text(errors='replace')[-2000:]}")
    figures: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return figures


def profile_here(options: argparse.Namespace) -> dict[str, Any]:
    """Times of a step in this process: whole and by kind, in seconds, and the dearest operators."""
    import torch

    from pat_serve.server.engine.workers.stepped import SteppedEngine

    with tempfile.TemporaryDirectory() as scratch:
        layers = {"flag": "--baseline", "load_format": "dummy", "layers": options.layers, "scratch": Path(scratch)}
        source = resolve(options.baseline, **layers)
        tokens = options.prompt_tokens + 2 * options.steps + _WARMUP_STEPS + 1
        engine = SteppedEngine(
            model=source.path,
            dtype=serving_dtype(),
            load_format="dummy",
            batch_size=1,
            max_model_tokens=tokens,
            max_step_tokens=tokens,
            kv_cache_bytes=2**28,
            enforce_eager=True,
            seed=0,
        )
        draw = random.Random(0)
        engine.prefill([[draw.randrange(source.shape.vocab) for _ in range(options.prompt_tokens)]],
                       output_tokens=tokens - options.prompt_tokens)  # fmt: skip
        engine.decode(_WARMUP_STEPS)
        steps_s = []
        for _ in range(options.steps):
            begun_s = time.perf_counter()
            engine.decode(1)
            steps_s.append(time.perf_counter() - begun_s)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            begun_s = time.perf_counter()
            engine.decode(options.steps)
            profiled_s = (time.perf_counter() - begun_s) / options.steps
    own_s = {event.key: event.self_cpu_time_total / 1e6 / options.steps for event in profiler.key_averages()}
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, seconds in own_s.items():
        kinds[kind_of(name)] += seconds
    kinds["between"] = profiled_s - sum(kinds.values())
    return {
        "step_s": statistics.median(steps_s),
        "profiled_step_s": profiled_s,
        "kinds_s": kinds,
        "dearest_s": dict(sorted(own_s.items(), key=lambda item: -item[1])[:16]),
    }


def kind_of(operator: str) -> str:
    """The kind of a profiled operator, by its name."""
    name = operator.lower()
    if any(part in name for part in _ATTENTION):
        return KINDS[1]
    if any(part in name for part in _PRODUCTS):
        return KINDS[0]
    return KINDS[2]


def table(turns: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Medians over the turns, in milliseconds, and what the candidate gains."""
    sides = [turns[model] for model in (options.baseline, options.candidate)]

    def row(name: str, values: list[float], share: float | None) -> str:
        told = "" if share is None else f"{share:.1%}"
        return f"| {name} | {values[0] * 1e3:.2f} | {values[1] * 1e3:.2f} | {values[0] / values[1]:.3f} | {told} |"

    with tempfile.TemporaryDirectory() as scratch:
        shapes = [
            resolve(name, flag="--model", load_format="dummy", layers=options.layers, scratch=Path(scratch)).shape
            for name in (options.baseline, options.candidate)
        ]
    size = {"batch_size": 1, "context_tokens": options.prompt_tokens, "dtype_bytes": DTYPE_BYTES[serving_dtype()]}
    bytes_read = [decode_bytes(shape, **size) for shape in shapes]
    profiled = [statistics.median(turn["profiled_step_s"] for turn in side) for side in sides]
    lines = [
        "| of a decode step | baseline, ms | candidate, ms | ratio | of the baseline's step |",
        "|---|---|---|---|---|",
        row("step, not profiled", [statistics.median(turn["step_s"] for turn in side) for side in sides], None),
        row("step, profiled", profiled, 1.0),
    ]
    for kind in KINDS:
        values = [statistics.median(turn["kinds_s"][kind] for turn in side) for side in sides]
        lines.append(row(kind, values, values[0] / profiled[0]))
    return "\n".join([*lines, f"ceiling by bytes read: {bytes_read[0] / bytes_read[1]:.3f}"])


if __name__ == "__main__":
    main()
