"""Time what `pat-train` does before its first step, stage by stage, beside one forward and backward pass of the base.

Example: python -m benchmarks.first_step --model SmolLM2-135M-Instruct --rows 128 --tokens 256

The stages run by the functions that a training runs, on rows of text that every machine with Python has. The pass goes
over the same rows in the same process, dtype and batches, with the stock loss; the weights are frozen, so that it is as
cheap as such a pass can be. It is taken before the stages and after them, and the faster one counts. The bar: all
stages together take at most three such passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

# This time is taken before the heavy imports, which are one of the timed stages.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
BEGAN = {name: clock() for name, clock in CLOCKS.items()}

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: E402

from pat_serve.demo.corpus import build_corpus, write_rows  # noqa: E402
from pat_serve.training import assemble  # noqa: E402
from pat_serve.training.checks.prepare import Prepared, prepare  # noqa: E402
from pat_serve.training.config import TrainRecipe  # noqa: E402
from pat_serve.training.model import ready  # noqa: E402
from pat_serve.training.ranks import Ranks  # noqa: E402

IMPORT_S = {name: clock() - BEGAN[name] for name, clock in CLOCKS.items()}
BAR = 3.0
# No token has more characters in any text and tokenizer.
MOST_CHARACTERS_PER_TOKEN = 10


class _FirstStepError(Exception):
    """The trainer is about to take its first step."""


class _Stop(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    def on_step_begin(self, *_arguments: Any, **_settings: Any) -> None:
        raise _FirstStepError


class Stages:
    """Seconds by stage, in the order in which they ended.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its seconds count as the stage's."""

        def timed(*arguments: Any, **settings: Any) -> Any:
            began = self.clock()
            try:
                return function(*arguments, **settings)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + self.clock() - began

        return timed


def write_texts(path: Path, rows: int, tokens: int) -> None:
    """Write rows that all have at least so many tokens."""
    text = "\n\n".join(build_corpus().base_texts)
    length = tokens * MOST_CHARACTERS_PER_TOKEN
    text *= 1 + rows * length // len(text)
    pieces = [text[at : at + length] for at in range(0, rows * length, length)]
    write_rows(path, [{"prompt": "### Continue\n", "completion": piece} for piece in pieces])


def pass_seconds(prepared: Prepared, clock: Callable[[], float]) -> float:
    """Time one forward and backward pass of the base over the calibration's batches, in seconds."""
    base = AutoModelForCausalLM.from_pretrained(
        prepared.checkpoint.folder, dtype=getattr(torch, prepared.inputs.dtype), local_files_only=True
    )
    base.eval().requires_grad_(False)
    base.enable_input_require_grads()
    began = clock()
    for batch in prepared.calibration:
        base(**batch, use_cache=False).loss.backward()
    return clock() - began


def measure(recipe: TrainRecipe, import_s: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Time every stage and the pass, in seconds."""
    stages, ranks = Stages(clock), Ranks(index=0, count=1)
    stages.seconds["import"] = import_s
    prepared = stages.time("prepare", prepare)(recipe, ranks)
    passes = [pass_seconds(prepared, clock)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        for place, name, stage in (
            (AutoModelForCausalLM, "from_pretrained", "load"),
            (assemble, "calibrate", "calibrate"),
            (ready, "adapt", "rotate and insert"),
            (ready, "compensate", "compensate"),
            (ready, "slice_model", "narrow"),
        ):
            patched.enter_context(patch.object(place, name, stages.time(stage, getattr(place, name))))
        began, before = clock(), sum(stages.seconds.values())
        job = assemble.assemble(prepared, Path(folder) / "run", ranks, resumes=False)
        job.trainer.add_callback(_Stop())
        with suppress(_FirstStepError):
            job.trainer.train()
        seconds = clock() - began
        stages.seconds["trainer"] = seconds - (sum(stages.seconds.values()) - before)
    passes.append(pass_seconds(prepared, clock))
    total = sum(stages.seconds.values())
    return {
        "dtype": prepared.inputs.dtype,
        "threads": torch.get_num_threads(),
        "rows": len(prepared.data.samples),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in prepared.calibration),
        "stages_s": stages.seconds,
        "total_s": total,
        "passes_s": passes,
        "ratio": total / min(passes),
        "shares": {stage: seconds / min(passes) for stage, seconds in stages.seconds.items()},
    }


def main() -> None:
    """Measure and report; exit 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--rows", type=int, default=128, help="rows to calibrate on [default: 128]")
    parser.add_argument("--tokens", type=int, default=256, help="of each row [default: 256]")
    parser.add_argument("--ratio", type=float, default=0.25, help="as pat-train's [default: 0.25]")
    parser.add_argument("--batch-size", type=int, default=8, help="as pat-train's [default: 8]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[default: auto]")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="process: this process's CPU time")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_texts(data, options.rows, options.tokens)
        recipe = TrainRecipe(
            model=options.model, data=str(data), ratio=options.ratio, calibration_rows=options.rows,
            batch_size=options.batch_size, max_length_tokens=options.tokens, dtype=options.dtype, max_steps=100,
            report_to=(),
        )  # fmt: skip
        result = measure(recipe, IMPORT_S[options.clock], CLOCKS[options.clock])
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for stage, seconds in result["stages_s"].items():
            print(f"{stage:18} {seconds:8.2f} s {result['shares'][stage]:6.2f} passes")
        print(f"{'all stages':18} {result['total_s']:8.2f} s {result['ratio']:6.2f} passes (bar: {BAR:g})")
        one, other = result["passes_s"]
        print(
            f"a pass: {one:.2f} s before, {other:.2f} s after; {result['rows']} rows, {result['tokens']} tokens, "
            f"{result['dtype']}, {result['threads']} threads"
        )
    sys.exit(0 if result["ratio"] <= BAR else 1)


if __name__ == "__main__":
    main()
