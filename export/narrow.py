"""Walk a base checkpoint by its architecture table: the narrow model's config, shapes and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pat_serve.architectures import EMBEDDING, FINAL_NORM, HEAD, HIDDEN, ExportAs
from pat_serve.export.formats.overflow import round_floats
from pat_serve.export.reader import Run
from pat_serve.export.rewrite import embedding_factor, narrow_eps, rewrite_tensor
from pat_serve.rotation import effective_gain, rotate_tensor

_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HEAD_WEIGHT = f"{HEAD}.weight"


def narrow_config(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model: a stock config with the new width, eps and an explicit head_dim."""
    cut = run.plan.axes[HIDDEN]
    config = dict(run.base.config)
    if other := other_class(run):
        config = {name: value for name, value in config.items() if name not in other.dropped}
        config |= {"model_type": other.model_type, **other.settings}
    config["architectures"] = [architecture(run)]
    config["hidden_size"] = len(cut.kept)
    config["head_dim"] = run.base.head_dim
    config["num_key_value_heads"] = run.base.num_key_value_heads
    config["rms_norm_eps"] = narrow_eps(float(config["rms_norm_eps"]), cut)
    config["tie_word_embeddings"] = run.base.tied and not unties_head(run)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # Names of the base's folder or of its authors' code have no place in a self-contained checkpoint.
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)
    return config


def other_class(run: Run) -> ExportAs | None:
    """The stock class of the export, where a narrower model needs another one than the base's."""
    return None if run.plan.axes[HIDDEN].is_identity else run.base.family.export_as


def architecture(run: Run) -> str:
    """The stock class that loads the export."""
    other = other_class(run)
    return other.architecture if other else run.base.family.architecture


def unties_head(run: Run) -> bool:
    """A tied base whose embedding carries a full operator, or whose head takes the last norm's gain: they part ways.

    Mask and scale alone leave it tied: the final norm divides the scale out again.
    """
    fold = run.plan.folds.get(EMBEDDING)
    moved = (fold is not None and fold.rank > 0) or run.plan.rotation is not None
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
    shapes |= {name: (len(cut.kept),) for name in _zero_biases(run)}
    if unties_head(run):
        shapes[_HEAD_WEIGHT] = shapes[_EMBEDDING_WEIGHT]
    elif run.base.tied:
        # Some tied checkpoints carry the head as well; loaders ignore it, so it is not written.
        shapes.pop(_HEAD_WEIGHT, None)
    return shapes


def _zero_biases(run: Run) -> list[str]:
    """Biases that the export's class has and the base's has not."""
    modules = other.zero_biases if (other := other_class(run)) else ()
    return [f"{module.format(i=i)}.bias" for i in range(run.base.num_layers) for module in modules]


def narrow_tensors(
    run: Run, names: list[str], dtype: torch.dtype, runs_in: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The exported tensors, one at a time.

    Args:
        run: the run to export.
        names: which, in order; all of `narrow_shapes`.
        dtype: to write. The rewriting itself runs in float32, or in float64 for a float64 base.
        runs_in: dtype in which the model will run, which rounds the factor of a scaled embedding; `dtype` by default.
    """
    compute = torch.float64 if run.base.dtype == torch.float64 else torch.float32
    cut = run.plan.axes[HIDDEN]
    family = run.base.family
    embedding = embedding_factor(cut, runs_in or dtype) if family.scaled_embedding else 1.0
    zero_biases = set(_zero_biases(run))
    for name in names:
        if name in zero_biases:
            yield name, torch.zeros(len(cut.kept), dtype=dtype)
            continue
        raw_head = name == _HEAD_WEIGHT and unties_head(run)
        tensor = run.base.read(_EMBEDDING_WEIGHT if raw_head else name).to(compute)
        spec, layer, kind = family.match(name)
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
            norm_offset=family.norm_offset,
            embedding=embedding,
            tied_scale_K=_tied_scale(run, compute) if module == FINAL_NORM else None,
        )
        yield name, round_floats(narrow, dtype, name).contiguous()


def _tied_scale(run: Run, dtype: torch.dtype) -> Tensor | None:
    """s of the kept channels (K,) of an embedding that stays tied to the head."""
    fold = run.plan.folds.get(EMBEDDING)
    if not run.base.tied or fold is None or unties_head(run):
        return None
    return fold.scale_D[run.plan.axes[HIDDEN].kept].to(dtype)
