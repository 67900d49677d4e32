"""Rewrite every tensor without a weight: each has to come out as its header will say."""

from __future__ import annotations

import torch

from pat_serve.errors import BrokenPlan, first_line
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.contents import unties_head
from pat_serve.export.rewrite.scratch import Scratch
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import EMBEDDING, HEAD


def dry_run(run: Run, dtype: torch.dtype) -> None:
    """Rewrite every tensor on the meta device, where it costs nothing.

    Raises:
        BrokenPlan: one does not come out as planned; then the plan or the adapter does not fit the base.
    """
    if run.base.tied and not unties_head(run):
        # An update of a head that stays the embedding would be lost, one of that embedding would miss the head.
        for module in (HEAD, EMBEDDING):
            if module in run.adapter:
                raise BrokenPlan(
                    run.folder,
                    expected="updates of tensors that the export writes as they are",
                    found=f"one of {module}, which is tied to another",
                    fix="Train with --tied-embeddings untie, or without an adapter on it.",
                )
    rewriting = Rewriting(run, dtype, device="meta")
    for name, shape in rewriting.shapes.items():
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
