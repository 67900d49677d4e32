"""How much of a parent a cut model gets back: by shape, loss, trained weights and rate, at equal tokens.

    python -m benchmarks.recovery MODEL --data train.jsonl --held-out heldout.jsonl --text wiki.test.raw \
        --shape layers=24,ffn=1280 --set distillation_weight=1,train=all,learning_rate=2e-4 --tokens 100000 \
        --starts starts/ --out lines.jsonl

Each `--shape` is cut and refitted once and kept in `--starts`, then tuned with each `--set` of the recipe's settings,
each number of `--tokens` and each `--seed`. A line of JSON has the held-out loss, the held-out KL to the dense parent
and the perplexity of the first windows of a text. Lines that `--out` has already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cut_quality import windows_of
from pat_serve.training.assemble import assemble
from pat_serve.training.checks.prepare import Prepared, prepare
from pat_serve.training.config import TrainRecipe
from pat_serve.training.model.calibration import calibration_batches
from pat_serve.training.model.teacher import load_teacher
from pat_serve.training.ranks import Ranks
from pat_serve.training.search.measure import HeldOut
from pat_serve.training.start import lay_out

DENSE = "dense"
# A run's settings where `--set` says nothing else: steps of about 2,000 tokens, which a CPU makes in seconds.
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length_tokens": 256,
    "lora_rank": 64,
    "lora_dropout": 0.0,
    "calibration_rows": 64,
    "save_steps": 10**6,
    "logging_steps": 10,
    "report_to": "none",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The data to measure on: held-out rows, and token ids of a text's windows."""

    held_out: HeldOut
    windows: list[list[int]]

    @staticmethod
    def of(prepared: Prepared, windows: list[list[int]]) -> Measure:
        """Take the held-out rows of a run."""
        rows: Any = prepared.data.held_out
        batches = calibration_batches([rows[i] for i in range(len(rows))], 8)
        teacher = load_teacher(prepared.checkpoint, getattr(torch, prepared.inputs.dtype))
        return Measure(held_out=HeldOut.of(teacher, batches), windows=windows)

    @torch.no_grad()
    def take(self, model: Any) -> dict[str, float]:
        """Held-out loss and KL in nats a token, and the text's perplexity."""
        loss, kl = self.held_out.losses(model)
        nll = count = 0.0
        with self.held_out.autocast(model):
            for at in range(0, len(self.windows), 4):
                ids_BT = torch.tensor(self.windows[at : at + 4])
                logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
                nll += float(F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))
                count += ids_BT[:, 1:].numel()
        return {"held_out_loss": loss, "held_out_kl": kl, "perplexity": math.exp(nll / count)}


def settings_of(text: str) -> dict[str, str]:
    """The settings of a `--set`."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def main() -> None:
    """Make the lines that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("--data", type=Path, required=True, help="rows to tune on, as pat-train takes them")
    parser.add_argument("--held-out", type=Path, required=True, help="rows to measure loss and KL on")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's test file")
    parser.add_argument("--shape", action="append", required=True, help=f"as of pat-train, or '{DENSE}'; repeatable")
    parser.add_argument(
        "--set", action="append", default=[], help="settings of a recipe, as NAME=VALUE,...; repeatable"
    )
    parser.add_argument("--start", default="", help="settings that decide the cut, the same for all, as NAME=VALUE,...")
    parser.add_argument("--choose", default="", help="as of pat-train")
    parser.add_argument("--tokens", type=int, action="append", help="to tune on; 0 measures the cut [default: 0]")
    parser.add_argument("--seed", type=int, action="append", help="repeatable [default: 0]")
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens of the text [default: 24]")
    parser.add_argument("--starts", type=Path, required=True, help="folder for cut models before their first step")
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON")
    options = parser.parse_args()
    done = {key_of(line) for line in read_lines(options.out)}
    measure: Measure | None = None
    for shape in options.shape:
        for line in wanted(options, shape):
            if key_of(line) in done:
                continue
            prepared = prepare(recipe_of(options, line), Ranks.join())
            if measure is None:
                windows = windows_of(options.text, prepared.tokenizer, 512, options.windows)
                measure = Measure.of(prepared, windows)
            line |= make(options, line, prepared, measure)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def wanted(options: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """The lines to be made of a shape, as far as the command decides them."""
    for tokens in options.tokens or [0]:
        for settings in options.set or [""] if tokens else [""]:
            for seed in options.seed or [0]:
                yield {
                    "shape": shape,
                    "choose": options.choose,
                    "start": options.start,
                    "settings": settings,
                    "tokens": tokens,
                    "seed": seed,
                }


def key_of(line: dict[str, Any]) -> str:
    """The settings that identify a line."""
    return json.dumps([line[name] for name in ("shape", "choose", "start", "settings", "tokens", "seed")])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that there are."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def recipe_of(options: argparse.Namespace, line: dict[str, Any]) -> TrainRecipe:
    """The recipe of a line. A step has at most max_length_tokens tokens of each of its rows."""
    own = settings_of(line["start"]) | settings_of(line["settings"])
    settings = {**SETTINGS, **own}
    rows = int(settings["batch_size"]) * int(settings["gradient_accumulation_steps"])
    per_step = rows * int(settings["max_length_tokens"])
    if settings.get("train", "lora") != "lora":
        # Weights are trained themselves, and have no rank.
        settings = {name: value for name, value in settings.items() if not name.startswith("lora_")}
    settings |= {"max_steps": math.ceil(line["tokens"] / per_step), "seed": line["seed"]}
    settings |= {"model": options.model, "data": str(options.data), "eval_data": str(options.held_out)}
    settings["eval_steps"] = 10**6
    if line["shape"] == DENSE:
        settings |= {"method": "lora", "max_steps": max(1, settings["max_steps"])}
        del settings["calibration_rows"]  # nothing is cut that the stream would be measured for
    else:
        settings |= {"shape": line["shape"], "choose": line["choose"]}
    return TrainRecipe.build(settings, "the command")


def make(options: argparse.Namespace, line: dict[str, Any], prepared: Prepared, measure: Measure) -> dict[str, Any]:
    """Cut or take the cut that there is, tune, and measure."""
    key = json.dumps(
        [line["shape"], line["choose"], line["start"], prepared.recipe.refit, prepared.recipe.refit_shrinkage]
    )
    start = options.starts / sha256(key.encode()).hexdigest()[:12]
    began = time.perf_counter()
    is_there = (start / "recipe.yaml").is_file()
    job = assemble(prepared, start, Ranks.join(), resumes=is_there)
    cut_s = time.perf_counter() - began
    if not is_there:
        lay_out(prepared, job, start)
    model = job.trainer.model
    base = model.get_base_model()
    parameters = sum({id(p): p.numel() for name, p in base.named_parameters() if ".lora_" not in name}.values())
    result: dict[str, Any] = {"parameters": parameters, "cut_s": None if is_there else round(cut_s, 1)}
    if line["tokens"]:
        job.trainer.args.save_strategy = "no"
        job.trainer.args.eval_strategy = "no"  # the held-out rows are measured below, and once is enough
        (start / "metrics.jsonl").unlink(missing_ok=True)
        began = time.perf_counter()
        job.trainer.train()
        job.display.close()
        result |= {"train_s": round(time.perf_counter() - began, 1), "steps": prepared.inputs.total_steps}
        rows = prepared.data.samples
        length = sum(len(row["input_ids"]) for row in rows) / len(rows)
        recipe = prepared.recipe
        per_step = recipe.batch_size * recipe.gradient_accumulation_steps
        result["seen_tokens"] = round(prepared.inputs.total_steps * per_step * length)
    return result | measure.take(model)


if __name__ == "__main__":
    main()
