"""The orderings that the literature on one-shot pruning promises, on a real model: what holds, and by how much.

Example: `python -m benchmarks.one_shot_orderings MODEL --calibration valid.raw --out lines.jsonl --part errors`

Protocol: the model is pruned on the first `--rows` windows of `--length` tokens of one text. `errors` measures every
linear on the dense model's inputs: the mean squared error of its output as a share of the output's mean square.
`perplexity` prunes the model layer after layer, as `pat-train --method one-shot` does, and measures the first
`--test-rows` windows of another text: exp of the mean loss of every token of a window but its first.

Each finished line is appended to `--out`; a script that is started again makes the lines that are missing. Without
`--part` it prints what the lines say.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cut_quality import perplexity, windows_of
from benchmarks.one_shot_verdicts import print_verdicts
from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.machine.hardware import describe, serving_dtype
from pat_serve.training.methods.one_shot import OneShotSettings
from pat_serve.training.model.calibration import calibration_batches
from pat_serve.training.sparse.dsnot import mean_errors, refine
from pat_serve.training.sparse.layers import Layers, Stream, advance, listen
from pat_serve.training.sparse.masks import lowest, wanda_scores
from pat_serve.training.sparse.one_linear import Inputs, zeroed
from pat_serve.training.sparse.run import sparsity_by_layer
from pat_serve.training.sparse.walk import InputSums, groups_of_linears, prune_layers

PAIRS = {"SS": ("S", "S"), "SM": ("S", "M"), "MS": ("M", "S"), "MM": ("M", "M")}
WANDA, MAGNITUDE = {"mask": "wanda", "compensation": "none"}, {"mask": "magnitude", "compensation": "none"}
# `errors` measures these on every linear.
OF_A_LINEAR: dict[str, dict[str, Any]] = {
    **{f"2:4 {name}": {"pattern": "2:4", "mask": a, "compensation": b} for name, (a, b) in PAIRS.items()},
    "50 % SS": {"mask": "S", "compensation": "S"},
    "50 % SM": {"mask": "S", "compensation": "M"},
    "50 % wanda": WANDA,
    "50 % magnitude": MAGNITUDE,
}
# `perplexity` measures these of the whole model, the most telling first.
OF_THE_MODEL: dict[str, dict[str, Any]] = {
    "50 % SM": {"sparsity": 0.5},
    "50 % wanda": {"sparsity": 0.5, **WANDA},
    "50 % magnitude": {"sparsity": 0.5, **MAGNITUDE},
    "2:4 MM": {"pattern": "2:4"},
    "2:4 SS": {"pattern": "2:4", "mask": "S", "compensation": "S"},
    "2:4 wanda": {"pattern": "2:4", **WANDA},
    "70 % SM": {"sparsity": 0.7},
    "70 % SM, alpha": {"sparsity": 0.7, "allocation": "alpha"},
    "70 % wanda": {"sparsity": 0.7, **WANDA},
    "70 % wanda, alpha": {"sparsity": 0.7, "allocation": "alpha", **WANDA},
    "50 % wanda, dsnot": {"sparsity": 0.5, "refine": "dsnot", **WANDA},
    "70 % wanda, dsnot": {"sparsity": 0.7, "refine": "dsnot", **WANDA},
    "50 % SS": {"sparsity": 0.5, "mask": "S", "compensation": "S"},
    "2:4 MS": {"pattern": "2:4", "mask": "M", "compensation": "S"},
    "2:4 SM": {"pattern": "2:4", "mask": "S", "compensation": "M"},
}
DENSE = "dense"


def errors_of_layer(
    layers: Layers, checkpoint: Checkpoint, number: int, streams: list[Stream], *, measures: bool
) -> dict[str, Any]:
    """Relative errors of each linear of a dense layer by setting; the streams are taken through it."""
    found: dict[str, Any] = {}
    with layers.layer(number) as layer:
        if measures:
            for names in groups_of_linears(checkpoint.family, number, checkpoint.num_layers):
                own = {name: layer.get_submodule(name.removeprefix(f"model.layers.{number}.")) for name in names}
                sums = InputSums()
                listen(layer, next(iter(own.values())), streams, sums.add)
                inputs = sums.moments()
                for name, linear in own.items():
                    weight = linear.weight
                    assert isinstance(weight, torch.Tensor)
                    found[name.rpartition(".")[2]] = errors_of_linear(weight.float(), inputs)
        advance(layer, streams)
    return found


def errors_of_linear(weight_OI: torch.Tensor, inputs: Inputs) -> dict[str, float]:
    """Relative error by setting, and DSnoT's mean |e| of Wanda's rows at 50 %, before and after."""
    energy = inputs.error(weight_OI)
    found = {}
    for name, settings in OF_A_LINEAR.items():
        own = OneShotSettings(**settings)
        found[name] = inputs.error(zeroed(weight_OI, inputs, own.zeroing(own.share)) - weight_OI) / energy
    energies_I = inputs.second_II.diagonal()
    removed = lowest(wanda_scores(weight_OI, energies_I), 0.5, by_row=True)
    refined = refine(removed, weight_OI, inputs.mean_I, energies_I, OneShotSettings().zeroing(0.5).pattern)
    for name, mask in (("before", removed), ("after", refined)):
        found[f"dsnot {name}"] = float(mean_errors(mask, weight_OI, inputs.mean_I).abs().mean())
    return found


def pruned_model(checkpoint: Checkpoint, settings: Mapping[str, Any], streams: list[Stream], layers: Layers) -> Any:
    """The whole model, pruned layer after layer."""
    own = OneShotSettings(**settings)
    how = [own.zeroing(share) for share in sparsity_by_layer(checkpoint, own)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=getattr(torch, serving_dtype()))
    for _, pruned in prune_layers(layers, checkpoint.family, checkpoint.num_layers, streams, how, {}):
        assert pruned is not None
        model.load_state_dict(pruned.weights, strict=False)
    return model


def main() -> None:
    """Make the missing lines of a part, or print what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("--text", type=Path, help="WikiText-2's test file")
    parser.add_argument("--calibration", type=Path, help="a text to prune on, as its validation file")
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON, which are added to")
    parser.add_argument("--part", choices=("errors", "perplexity"), help="what to measure")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--test-rows", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.part is None:
        print_verdicts(lines)
        return
    began_s, known = time.monotonic(), {(line["part"], line["name"]) for line in lines}

    def write(name: object, **figures: Any) -> None:
        protocol = {"rows": given.rows, "length_tokens": given.length, "test_rows": given.test_rows}
        line = {"part": given.part, "name": str(name), **figures, "protocol": protocol, "cpu": describe()["cpu_model"]}
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({"name": name, **figures})[:200], flush=True)

    checkpoint, tokenizer = open_checkpoint(given.model), AutoTokenizer.from_pretrained(given.model)
    windows = windows_of(given.calibration, tokenizer, given.length, given.rows)
    examples = [{"input_ids": one, "attention_mask": [1] * len(one), "labels": one} for one in windows]
    batches = calibration_batches(examples, 8)
    layers = Layers(checkpoint, getattr(torch, serving_dtype()), torch.device("cpu"))
    if given.part == "errors":
        streams = layers.enter(batches)
        for number in range(checkpoint.num_layers):
            if time.monotonic() - began_s > 60 * given.minutes:
                return
            measures = ("errors", str(number)) not in known
            found = errors_of_layer(layers, checkpoint, number, streams, measures=measures)
            if measures:
                write(number, linears=found)
        return
    test = windows_of(given.text, tokenizer, given.length, given.test_rows)
    if ("perplexity", DENSE) not in known:
        dense = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=getattr(torch, serving_dtype()))
        write(DENSE, perplexity=perplexity(dense, test), seconds=0.0)
    for name, settings in OF_THE_MODEL.items():
        if ("perplexity", name) in known or time.monotonic() - began_s > 60 * given.minutes:
            continue
        start_s = time.monotonic()
        model = pruned_model(checkpoint, settings, layers.enter(batches), layers)
        seconds = time.monotonic() - start_s
        write(name, perplexity=perplexity(model, test), seconds=round(seconds, 1))


if __name__ == "__main__":
    main()
