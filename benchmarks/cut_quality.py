"""Perplexity of a model right after a cut, nothing trained: what the choices lose and what a refit restores.

Example: `python -m benchmarks.cut_quality MODEL --text wiki.test.raw --calibration wiki.valid.raw --shape layers=24`

The model is cut in memory as `pat-train --max-steps 0` cuts it, calibrated on windows of one text and measured on
windows of another. `--shape` may come several times, and each is measured with every `--refit`. With `--out` each line
is also added to a file, and what the file has already is not measured again. `--cache` keeps the measures of the base
and the windows of a line that was stopped; a cache belongs to one base, one code and one pair of texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.evaluation.text import wikitext2_from_file
from pat_serve.training.checks.width import target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import Calibration, calibrate, calibration_batches
from pat_serve.training.model.ready import make_ready

DENSE = "dense"
# Windows of a forward pass.
AT_ONCE = 8


def windows_of(path: Path, tokenizer: Any, length: int, most: int) -> list[list[int]]:
    """Token ids of the first windows of a text; all of them for 0."""
    ids = tokenizer(wikitext2_from_file(path), verbose=False).input_ids
    found = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return found[:most] if most else found


@torch.no_grad()
def perplexity(model: Any, windows: list[list[int]], progress: Path | None = None) -> float:
    """exp of the mean negative log-likelihood of every token of the windows but the first of each.

    Args:
        model: a causal language model of transformers.
        windows: token ids, all of one length.
        progress: a file that keeps the sums of the windows so far, for a call that is stopped.
    """
    model.eval()
    known = [] if progress is None or not progress.exists() else [float(text) for text in progress.read_text().split()]
    for at in range(AT_ONCE * len(known), len(windows), AT_ONCE):
        ids_BT = torch.tensor(windows[at : at + AT_ONCE])
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        known.append(float(nll))
        if progress is not None:
            with progress.open("a") as file:
                file.write(f"{known[-1]!r}\n")
    return math.exp(math.fsum(known) / sum(len(window) - 1 for window in windows))


class Cutter:
    """Cuts one base by recipes, and measures each way to turn its stream once.

    Args:
        checkpoint: the base.
        batches: what it is calibrated on.
        dtype: of its weights.
        cache: a folder that keeps the measures for the next call with the same base and batches; None for no such
            folder.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: list[dict[str, Tensor]], dtype: torch.dtype, cache: Path | None
    ) -> None:
        self.checkpoint, self.batches, self.dtype, self.cache = checkpoint, batches, dtype, cache
        self.measured: dict[str, Calibration] = {}

    def cut(self, recipe: TrainRecipe) -> Any:
        """The model of a recipe before its first step."""
        checkpoint, method = self.checkpoint, method_of(recipe)
        recipe = recipe.resolved(tied=checkpoint.tied, prunes=method.prunes, narrows="hidden" in method.axes)
        base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=self.dtype)
        calibration = self._measure(base, recipe) if method.wants_calibration(recipe) else None
        shape = target_shape(recipe, checkpoint)
        return make_ready(
            base, checkpoint.family, recipe, shape, 24, calibration=calibration, batches=self.batches
        ).model

    def _measure(self, base: Any, recipe: TrainRecipe) -> Calibration:
        assert recipe.rotate != "auto", "the recipe was not resolved"
        name = f"{recipe.rotate}-{'tied' if recipe.keeps_tie else 'untied'}"
        folder = None if self.cache is None else self.cache / name
        found = self.measured.get(name) or (None if folder is None else Calibration.load(folder))
        if found is None:
            found = calibrate(
                base,
                self.checkpoint.family,
                self.checkpoint.num_layers,
                self.batches,
                rotate=recipe.rotate,
                keeps_tie=recipe.keeps_tie,
            )
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                found.save(folder)
        self.measured[name] = found
        return found


def settings_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The measurements that are asked for, a line each: shape, refit, choice, axes, tie, and the number of windows."""
    for shape in options.shape:
        for refit in ["none"] if shape == DENSE else options.refit.split(","):
            turned = "hidden" in shape
            yield {
                "shape": shape,
                "refit": refit,
                "choose": options.choose,
                "rotate": options.rotate if turned else "none",
                "tied_embeddings": options.tied_embeddings if turned else "auto",
                "windows_asked": options.windows,
            }


def progress_of(settings: dict[str, Any], cache: Path | None) -> Path | None:
    """The file of a line's sums; None without a cache."""
    if cache is None:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.nll"


def recipe_of(model: str, settings: dict[str, Any]) -> TrainRecipe:
    """The recipe of a line."""
    asked: dict[str, Any] = {"shape": settings["shape"], "choose": settings["choose"], "max_steps": 0}
    if "hidden" in settings["shape"]:
        asked |= {name: settings[name] for name in ("rotate", "tied_embeddings")}
    asked |= {"compensate": False} if settings["refit"] == "none" else {"refit": settings["refit"]}
    return TrainRecipe.build({"model": model, "data": "given", **asked}, "the command")


def main() -> None:
    """One line of JSON for every shape and refit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's test file")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="a text to calibrate on, as its validation file"
    )
    parser.add_argument("--shape", action="append", required=True, help=f"as of pat-train, or '{DENSE}'")
    parser.add_argument("--refit", default="none,lora,full", help="of none, lora, full, with commas [default: all]")
    parser.add_argument("--choose", default="", help="as of pat-train")
    parser.add_argument("--rotate", default="auto", help="as of pat-train [default: auto]")
    parser.add_argument("--tied-embeddings", default="auto", help="as of pat-train [default: auto]")
    parser.add_argument("--context-tokens", type=int, default=512, help="tokens of a window [default: 512]")
    parser.add_argument("--calibration-windows", type=int, default=32, help="windows to calibrate on [default: 32]")
    parser.add_argument("--windows", type=int, default=0, help="windows to measure on [default: all]")
    parser.add_argument("--dtype", default="bfloat16", help="[default: bfloat16]")
    parser.add_argument("--out", type=Path, help="file that each line is added to; lines that it has are left out")
    parser.add_argument("--cache", type=Path, help="folder for measures of the base, kept for the next call")
    options = parser.parse_args()
    done = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out and options.out.exists()
        else []
    )
    wanted = [one for one in settings_of(options) if not any(one.items() <= line.items() for line in done)]
    if not wanted:
        return
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    measured = windows_of(options.text, tokenizer, options.context_tokens, options.windows)
    seen = windows_of(options.calibration, tokenizer, options.context_tokens, options.calibration_windows)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in seen]
    dtype = getattr(torch, options.dtype)
    cutter = Cutter(open_checkpoint(options.model), calibration_batches(rows, 4), dtype, options.cache)
    for settings in wanted:
        torch.manual_seed(0)
        began = time.perf_counter()
        if settings["shape"] == DENSE:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        else:
            model = cutter.cut(recipe_of(options.model, settings))
        cut_s = time.perf_counter() - began
        base = getattr(model, "get_base_model", lambda model=model: model)()
        parameters = sum({id(p): p.numel() for name, p in base.named_parameters() if ".lora_" not in name}.values())
        figure = perplexity(model, measured, progress_of(settings, options.cache))
        line = {
            **settings,
            "tied": base.get_output_embeddings().weight is base.get_input_embeddings().weight,
            "perplexity": figure,
            "windows": len(measured),
            "parameters": parameters,
            "cut_s": round(cut_s, 1),
            "measured_s": round(time.perf_counter() - began - cut_s, 1),
        }
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
