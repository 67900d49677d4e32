"""Choices and replaced weights from before the first step, kept in a run's folder for a run that is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pat_serve.cut.cuts import Cuts
from pat_serve.cut.slicing import targets
from pat_serve.run.folder import list_checkpoints
from pat_serve.run.replaced import started_files
from pat_serve.training.methods import Method
from pat_serve.training.model.ready import Earlier

CHOICE_FILE = "choice.safetensors"


def save_choice(folder: Path, chosen: Cuts) -> None:
    """Write the kept indices of all lines but the stream's, complete or not at all; none where nothing was chosen."""
    if not chosen:
        return
    temporary = folder / f".{CHOICE_FILE}.partial"
    save_file({line: cut.kept for line, cut in chosen.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / CHOICE_FILE)


def load_earlier(run: Path) -> Earlier:
    """Read the choices and weights that a resumed run began with."""
    path = run / CHOICE_FILE
    weights: dict[str, Tensor] = {}
    for file in started_files(run):
        weights |= load_file(file)
    return Earlier(
        kept=load_file(path) if path.is_file() else {}, weights=weights, is_tuned=bool(list_checkpoints(run))
    )


def replaced_weights(model: Any, method: Method, replaced: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The replaced weights of a model that may have been cut down, in the shapes of the (turned) base, one at a time.

    Args:
        model: the PEFT model.
        method: says what it was cut by.
        replaced: names in the base of their modules.
    """
    if not replaced:
        return
    base = model.get_base_model()
    weights = [f"{name}.weight" for name in replaced]
    for name, target in targets(method.family, method.sliced_by, method.base, weights).items():
        assert target is not None, f"{name} was replaced and dropped"
        module: Any = base.get_submodule(target.name.removesuffix(".weight"))
        yield name, target.widen(getattr(module, "base_layer", module).weight.detach().cpu())
