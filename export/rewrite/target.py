"""Walk a base checkpoint by its architecture table: the narrow model's config, shapes and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pat_serve.architectures import EMBEDDING, HEAD
from pat_serve.axes import HIDDEN
from pat_serve.cut_config import cut_config
from pat_serve.errors import BrokenPlan, first_line
from pat_serve.export.rewrite.blocks import Rewriting, Scratch
from pat_serve.export.rewrite.rewrite import embedding_factor, narrow_eps
from pat_serve.export.run.reader import Run
from pat_serve.family import ExportAs
from pat_serve.slicing import targets

_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HEAD_WEIGHT = f"{HEAD}.weight"


def narrow_config(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the exported model: a stock config with the new width, eps and an explicit head_dim."""
    config = cut_config(run.base.config, run.base.family, run.plan.cuts)
    config["rms_norm_eps"] = narrow_eps(float(config["rms_norm_eps"]), run.plan.cuts[HIDDEN])
    config["tie_word_embeddings"] = run.base.tied and not unties_head(run)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # Names of the base's folder or of its authors' code have no place in a self-contained checkpoint.
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)
    return config


def other_class(run: Run) -> ExportAs | None:
    """The stock class of the export, where a cut model needs another one than the base's."""
    base = run.base.sizes
    return run.base.family.class_of_export(base, run.plan.cuts.sizes(base), run.base.config)


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
    cut = run.plan.cuts[HIDDEN]
    found = targets(run.base.family, run.plan.cuts, run.base.sizes, run.base.tensors)
    shapes = {target.name: target.shape for target in found.values() if target}
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
    """The exported tensors, one at a time and whole; what is written to disk goes through `Rewriting` in blocks.

    Args:
        run: the run to export.
        names: which, in order; all of `narrow_shapes`.
        dtype: to write. The rewriting itself runs in float32, or in float64 for a float64 base.
        runs_in: dtype in which the model will run, which rounds the factor of a scaled embedding; `dtype` by default.
    """
    rewriting, shapes, scratch = rewriting_of(run, dtype, runs_in), narrow_shapes(run), Scratch()
    for name in names:
        whole, done = torch.empty(shapes[name], dtype=dtype), 0
        for block in rewriting.blocks(name, scratch):
            # A block is gone when the next one is asked for.
            whole[done : done + len(block)] = block
            done += len(block)
        yield name, whole


def rewriting_of(run: Run, dtype: torch.dtype, runs_in: torch.dtype | None = None, device: str = "cpu") -> Rewriting:
    """The rewriting of a run's tensors in blocks.

    Args:
        run: the run to export.
        dtype: to write. The rewriting itself runs in float32, or in float64 for a float64 base.
        runs_in: dtype in which the model will run, which rounds the factor of a scaled embedding; `dtype` by default.
        device: "meta" computes shapes and dtypes alone, and reads no weight.
    """
    embedding = embedding_factor(run.plan.cuts[HIDDEN], runs_in or dtype) if run.base.family.scaled_embedding else 1.0
    return Rewriting(
        run, dtype, embedding=embedding, unties_head=unties_head(run), zero_biases=_zero_biases(run), device=device
    )


def dry_run(run: Run, dtype: torch.dtype) -> None:
    """Rewrite every tensor on the meta device, where it costs nothing: each comes out as its header will say.

    Raises:
        BrokenPlan: one does not; then the plan or the adapter does not fit the base.
    """
    rewriting, shapes = rewriting_of(run, dtype, device="meta"), narrow_shapes(run)
    for module in run.adapter:
        # An update of a head that stays the embedding would be lost, one of that embedding would miss the head.
        if f"{module}.weight" not in shapes or (module == EMBEDDING and _HEAD_WEIGHT not in shapes):
            raise BrokenPlan(
                run.folder,
                expected="updates of tensors that the export writes as they are",
                found=f"one of {module}, which is tied to another",
                fix="Train with --tied-embeddings untie, or without an adapter on it.",
            )
    for name, shape in shapes.items():
        try:
            blocks = list(rewriting.blocks(name, Scratch()))
            found = (sum(len(block) for block in blocks), *blocks[0].shape[1:])
            dtypes = {block.dtype for block in blocks}
        except (RuntimeError, IndexError) as error:
            raise _misfit(run, name, shape, first_line(error)) from error
        if found != shape or dtypes != {dtype}:
            raise _misfit(run, name, shape, f"{found}")


def _misfit(run: Run, name: str, shape: tuple[int, ...], found: str) -> BrokenPlan:
    return BrokenPlan(run.folder, expected=f"{name} to come out as {shape}", found=found, fix="Repeat the training.")
