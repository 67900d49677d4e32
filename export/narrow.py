"""Walk a base checkpoint by its architecture table: the narrow model's config, shapes and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pat_serve.architectures import HIDDEN
from pat_serve.export.reader import Run
from pat_serve.export.rewrite import narrow_eps, rewrite_tensor
from pat_serve.rotation import effective_gain, rotate_tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def narrow_config(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model: a stock config with the new width, eps and an explicit head_dim."""
    cut = run.plan.axes[HIDDEN]
    config = dict(run.base.config)
    config["architectures"] = [run.base.family.architecture]
    config["hidden_size"] = len(cut.kept)
    config["head_dim"] = run.base.head_dim
    config["rms_norm_eps"] = narrow_eps(float(config["rms_norm_eps"]), cut)
    config["tie_word_embeddings"] = run.base.tied and not unties_head(run)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # Names of the base's folder or of its authors' code have no place in a self-contained checkpoint.
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)
    return config


def unties_head(run: Run) -> bool:
    """A tied base whose embedding carries a full operator, or whose head takes the last norm's gain: they part ways."""
    moved = EMBEDDING.removesuffix(".weight") in run.plan.folds or run.plan.rotation is not None
    return run.base.tied and moved


def narrow_shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """Every tensor of the exported model with its shape, without reading a weight, in the order of the layers."""
    cut = run.plan.axes[HIDDEN]
    shapes = {}
    for name, entry in run.base.tensors.items():
        spec, _, kind = run.base.family.match(name)
        axes = spec.axes if kind == "weight" else spec.axes[:1]
        sizes = zip(axes, entry.shape, strict=True)
        shapes[name] = tuple(len(cut.kept) if axis == HIDDEN else size for axis, size in sizes)
    if unties_head(run):
        shapes[HEAD] = shapes[EMBEDDING]
    elif run.base.tied:
        # Some tied checkpoints carry the head as well; loaders ignore it, so it is not written.
        shapes.pop(HEAD, None)
    return shapes


def narrow_tensors(run: Run, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The exported tensors, one at a time.

    Args:
        run: the run to export.
        names: which, in order; all of `narrow_shapes`.
        dtype: to write. The rewriting itself runs in float32, or in float64 for a float64 base.
    """
    compute = torch.float64 if run.base.dtype == torch.float64 else torch.float32
    cut = run.plan.axes[HIDDEN]
    for name in names:
        raw_head = name == HEAD and unties_head(run)
        tensor = run.base.read(EMBEDDING if raw_head else name).to(compute)
        spec, layer, kind = run.base.family.match(name)
        module = name.rpartition(".")[0]
        if run.plan.rotation is not None:
            norm = spec.norm.format(i=layer) if spec.norm is not None and kind == "weight" else None
            gain_D = effective_gain(run.base.read(f"{norm}.weight").to(compute), run.base.family) if norm else None
            tensor = rotate_tensor(tensor, spec, run.base.family, run.plan.rotation.to(compute), gain_D)
        narrow = rewrite_tensor(
            tensor,
            spec,
            cut,
            fold=run.plan.folds.get(module),
            update=run.adapter.get(module) if kind == "weight" else None,
        )
        yield name, narrow.to(dtype).contiguous()
