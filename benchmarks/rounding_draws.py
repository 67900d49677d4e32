"""Compare the rounding to 16 bits with random roundings of the same size: the reason for the gate's factors.

Example: python -m benchmarks.rounding_draws --runs run/ --depths 8 32 80 --draws 6

A run's float32 export is moved at random by up to half a step of the dtype, each time by other numbers, and compared
with the trained model as the 16-bit files are. The table has the files' figures and their ratios to a draw's, from the
least to the most of all draws: the ratio of the largest differences, and the roots of the ratios of the mean and the
median KL (a KL grows with the square of an error). The runs of --depths are random ones of narrow models with so many
layers. The models have to be Llamas.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pat_serve.export.exporter import export_run
from pat_serve.export.parity.answers import answer
from pat_serve.export.parity.figures import Figures, compare_logits
from pat_serve.export.parity.masked import load_masked_model
from pat_serve.export.parity.prompts import parity_prompts
from pat_serve.export.rewrite.rounding import round_at_random
from pat_serve.export.run.reader import open_run
from pat_serve.machine.hardware import describe
from tests.random_runs import random_run
from tests.tiny_models import save_tiny_llama


def main() -> None:
    """Measure the draws of every run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="finished runs")
    parser.add_argument("--depths", nargs="*", type=int, default=[], help="layers of random runs")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument("--draws", type=int, default=6)
    options = parser.parse_args()
    machine = describe()
    date = datetime.now(UTC).date().isoformat()
    print(f"{date}, {machine['cpu_model']}, torch {machine['torch']}; {options.draws} draws\n")
    print("| run | files | max / std, mean KL, median KL | of a draw's: max | mean KL, root | median KL, root |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        runs = {str(run.name): run for run in options.runs}
        for depth in options.depths:
            base = save_tiny_llama(Path(scratch) / f"base{depth}", num_hidden_layers=depth)
            runs[f"random, {depth} layers"] = random_run(Path(scratch) / f"run{depth}", base)
        for name, run in runs.items():
            for dtype in options.dtypes:
                with tempfile.TemporaryDirectory() as folder:
                    print(_line(name, dtype, *_measure(run, Path(folder), dtype, options.draws)), flush=True)


def _measure(folder: Path, scratch: Path, dtype: str, draws: int) -> tuple[Figures, list[Figures]]:
    """Figures of the files and of each draw, all computed in float32."""
    run = open_run(folder)
    prompts = replace(parity_prompts(run), continued=[])
    wide = load_masked_model(run, torch.float32)
    trained = answer(wide, prompts, "trained", []).logits
    del wide

    def figures(model: object) -> Figures:
        return compare_logits(trained, answer(model, prompts, "draw", []).logits)

    def load(name: str) -> torch.nn.Module:
        export_run(folder, scratch / name, dtype=name, parity=False)
        return AutoModelForCausalLM.from_pretrained(scratch / name, dtype=torch.float32).eval()

    files, model = figures(load(dtype)), load("float32")
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = []
    for draw in range(draws):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(exact[name])
            round_at_random(parameter.data, f"{draw} {name}", getattr(torch, dtype))
        found.append(figures(model))
    return files, found


def _line(name: str, dtype: str, files: Figures, draws: list[Figures]) -> str:
    figures = f"{files.max_abs_over_std:.1e}, {files.mean_kl_nats:.1e}, {files.median_kl_nats:.1e}"
    ratios: list[Iterator[float]] = [
        (files.max_abs_over_std / draw.max_abs_over_std for draw in draws),
        (math.sqrt(files.mean_kl_nats / draw.mean_kl_nats) for draw in draws),
        (math.sqrt(files.median_kl_nats / draw.median_kl_nats) for draw in draws),
    ]
    spans = [f"{ends[0]:.2f} to {ends[-1]:.2f}" for ends in map(sorted, ratios)]
    return f"| {' | '.join([name, dtype, figures, *spans])} |"


if __name__ == "__main__":
    main()
