"""A one-shot run from its checked inputs to a finished run/ folder, layer by layer; also its resumption.

Each layer's new weights are a file of `run/weights/`, complete or absent. A run that is resumed passes its streams
through the layers that are there and goes on behind them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.pattern import Pattern
from pat_serve.files.atomic import write_text
from pat_serve.run.folder import METRICS_FILE, WEIGHTS_FOLDER
from pat_serve.run.plan import PruningPlan, file_sha256
from pat_serve.run.replaced import write_replaced_file
from pat_serve.terminal.progress import say, track
from pat_serve.training.checks.prepare import Prepared
from pat_serve.training.methods.one_shot import OneShotSettings
from pat_serve.training.result import PARITY_ROWS, write_finish
from pat_serve.training.sparse.allocation import allocate, mean_exponent, tail_exponent
from pat_serve.training.sparse.layers import Layers
from pat_serve.training.sparse.walk import PrunedLayer, groups_of_linears, prune_layers


def prune(prepared: Prepared, run: Path) -> None:
    """Make the zeros of every layer that has none yet, and write the plan.

    Args:
        prepared: the checked inputs.
        run: the run's folder, begun.
    """
    (run / WEIGHTS_FOLDER).mkdir(exist_ok=True)
    checkpoint, own = prepared.checkpoint, OneShotSettings.of(prepared.recipe)
    number_of_layers = checkpoint.num_layers
    shares = sparsity_by_layer(checkpoint, own)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = Layers(checkpoint, getattr(torch, prepared.inputs.dtype), device)
    done = _Done(run, number_of_layers)
    lines = _known_lines(run, len(done))
    if done:
        say(f"{run}: {len(done)} of {number_of_layers} layers were pruned before")
    walked = prune_layers(
        layers,
        checkpoint.family,
        number_of_layers,
        layers.enter(prepared.calibration),
        [own.zeroing(share) for share in shares],
        done,
    )
    for number, pruned in track(walked, "prune layers", number_of_layers):
        if pruned is not None:
            # The layer's file comes last: it says that the layer is done, and a line without one is written again.
            lines.append(_line(number, pruned))
            write_text(run / METRICS_FILE, "".join(f"{line}\n" for line in lines))
            write_replaced_file(run / WEIGHTS_FOLDER, _file_of(number), pruned.weights)
    modules = [name for i in range(number_of_layers) for name in _linears(checkpoint, i)]
    write_finish(
        run,
        tokenizer=prepared.tokenizer,
        prompts=[example["input_ids"] for example in prepared.data.samples[:PARITY_ROWS]],
        end_token_ids=prepared.data.end_token_ids,
        plan=PruningPlan(
            method=prepared.recipe.method,
            base=prepared.inputs.base,
            weights={_file_of(i): file_sha256(run / WEIGHTS_FOLDER / _file_of(i)) for i in range(number_of_layers)},
            sparsity=dict.fromkeys(modules, own.pattern),
        ),
    )
    say(f"{run}: {100 * _mean_zeros(lines):.1f} % of the decoder's linears are zeros; they bring no speed in vLLM")


def sparsity_by_layer(checkpoint: Checkpoint, own: OneShotSettings) -> list[float]:
    """Share of zeros for every layer.

    Args:
        checkpoint: the base, whose weights `alpha` reads.
        own: the method's settings.
    """
    if own.allocation == "uniform" or Pattern.parse(own.pattern).group:
        return [own.share] * checkpoint.num_layers
    exponents, parameters = [], []
    for i in track(range(checkpoint.num_layers), "spectra of layers", checkpoint.num_layers):
        found = []
        for name in _linears(checkpoint, i):
            found.append(tail_exponent(checkpoint.read(f"{name}.weight")))
        exponents.append(mean_exponent(found))
        parameters.append(sum(checkpoint.tensors[f"{name}.weight"].size_bytes for name in _linears(checkpoint, i)))
    return allocate(exponents, parameters, own.share, own.resolved_spread)


def _linears(checkpoint: Checkpoint, layer: int) -> list[str]:
    groups = groups_of_linears(checkpoint.family, layer, checkpoint.num_layers)
    return [name for group in groups for name in group]


class _Done(Mapping[int, Mapping[str, Tensor]]):
    """The weights of the layers that a run has pruned; a layer's are read when they are asked for."""

    def __init__(self, run: Path, number_of_layers: int) -> None:
        self._folder, self._count = run / WEIGHTS_FOLDER, 0
        # A layer counts only behind complete ones: its inputs passed them.
        while self._count < number_of_layers and (self._folder / _file_of(self._count)).is_file():
            self._count += 1

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        if layer not in range(self._count):
            raise KeyError(layer)
        weights: dict[str, Tensor] = load_file(self._folder / _file_of(layer))
        return weights

    def __contains__(self, layer: object) -> bool:
        return layer in range(self._count)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def __len__(self) -> int:
        return self._count


def _file_of(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _known_lines(run: Path, layers: int) -> list[str]:
    """The lines of metrics.jsonl of the layers that are there."""
    path = run / METRICS_FILE
    return path.read_text(encoding="utf-8").splitlines()[:layers] if path.is_file() else []


def _line(number: int, pruned: PrunedLayer) -> str:
    figures = pruned.figures
    sizes = {name: pruned.weights[f"{name}.weight"].numel() for name in figures}
    zeros = sum(figures[name].zeros * size for name, size in sizes.items())
    return json.dumps(
        {
            "layer": number,
            "parameters": sum(sizes.values()),
            "zeros": zeros / sum(sizes.values()),
            "linears": {_short(name): asdict(one) for name, one in figures.items()},
        }
    )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _mean_zeros(lines: list[str]) -> float:
    layers = [json.loads(line) for line in lines]
    total = sum(layer["parameters"] for layer in layers)
    return float(sum(layer["zeros"] * layer["parameters"] for layer in layers) / total)
