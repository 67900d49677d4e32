"""One tensor's rewriting: what is turned, merged, folded and cut, and the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.cuts import AxisCut
from pat_serve.cut.hybrid import HybridFold
from pat_serve.cut.rotation import effective_gain, rotate_tensor
from pat_serve.cut.slicing import Target
from pat_serve.export.rewrite.contents import unties_head
from pat_serve.export.rewrite.fused import Fused, fuse
from pat_serve.export.rewrite.stream_width import rewrite_tensor
from pat_serve.export.run.adapter import LoraUpdate
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import EMBEDDING, FINAL_NORM
from pat_serve.families.family import Family


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tensor's line in the table, and what is to be folded into it.

    The entries that it is applied to are those that stay along every dimension but the residual stream's, which `fused`
    cuts after the operator has mixed its channels.

    Attributes:
        target: the exported tensor.
        family: of the base.
        cut: of the hidden axis, as far as a rotation has not done it.
        fused: for a tensor with a hidden dimension that is no norm's.
        rotation: Q, or its kept columns; None where nothing is turned.
        gain_D: the effective gain of the norm that feeds a reader that is turned.
        tied_scale_K: for the final norm of a model whose head stays tied.
        trained_gain: what takes a norm's place.
        embedding: the factor of a scaled embedding, 1 for others.
    """

    target: Target
    family: Family
    cut: AxisCut
    fused: Fused | None
    rotation: Tensor | None
    gain_D: Tensor | None
    tied_scale_K: Tensor | None
    trained_gain: Tensor | None
    embedding: float

    @property
    def thick(self) -> bool:
        """Whether the job computes many products for each number, which wants large blocks."""
        return self.rotation is not None or (self.fused is not None and self.fused.l0_RD is not None)

    def part(self, start: int, stop: int) -> Job:
        """The same for some of the kept rows of a weight whose rows are independent, or columns likewise."""
        return replace(self, fused=self.fused.part(start, stop)) if self.fused else self

    def apply(self, tensor: Tensor, memory: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The rewritten tensor, or block.

        Args:
            tensor: in the dtype to compute in.
            memory: gives a tensor of a shape that the result may be put in.
        """
        if self.trained_gain is not None:
            # A trained gain belongs to the turned stream, where the stream is turned.
            tensor = self.trained_gain
        elif self.rotation is not None:
            tensor = rotate_tensor(tensor, self.target.spec, self.family, self.rotation, self.gain_D)
        out = None
        if self.fused is not None and tensor.dim() == 2 and not tensor.is_meta:
            shape = list(tensor.shape)
            shape[0 if self.fused.first else 1] = len(self.fused.kept)
            out = memory(tuple(shape))
        return rewrite_tensor(
            tensor,
            self.target.spec,
            self.cut,
            fused=self.fused,
            norm_offset=self.family.norm_offset,
            embedding=self.embedding,
            tied_scale_K=self.tied_scale_K,
            out=out,
        )


class Jobs:
    """Makes the jobs of a run's tensors.

    Args:
        run: the run to export.
        compute: the dtype to compute in.
        embedding: the factor of a scaled embedding, 1 for others.
        read: gives a stored tensor of the base by its name, in that dtype.
        device: of all tensors.
    """

    def __init__(
        self, run: Run, compute: torch.dtype, embedding: float, read: Callable[[str], Tensor], device: str
    ) -> None:
        self._run, self._compute, self._embedding, self._read, self._device = run, compute, embedding, read, device
        cut = run.plan.cuts.line(HIDDEN, None, run.base.sizes)
        self._cut = AxisCut(width=cut.width, kept=cut.kept.to(device))
        self._kept_first = AxisCut(width=cut.width, kept=torch.arange(len(cut.kept), device=device))
        rotation = run.plan.rotation
        self._rotation = None if rotation is None else rotation.to(device, compute)
        # Computing the columns that are cut would be a quarter of all work.
        self._rotation_kept = None if self._rotation is None else self._rotation[:, self._cut.kept].contiguous()

    def job(self, target: Target, *, turned: bool) -> Job:
        """Collect everything that a tensor's rewriting needs.

        Args:
            target: the exported tensor.
            turned: its numbers are the turned model's already.
        """
        run, family = self._run, self._run.base.family
        spec, kind = target.spec, target.name.rpartition(".")[2]
        # Operators, updates and gains go by the base's numbers of layers.
        module = spec.module.format(i=target.layer)
        fold = run.plan.folds.get(module)
        fold = _fold_on(fold.to(self._compute), self._device) if fold else None
        update = run.adapter.get(module) if kind == "weight" else None
        update = _update_on(update, target, self._device, self._compute) if update else None
        gain = run.plan.norms.get(module) if kind == "weight" else None
        gain_D, rotation, cut = None, None if turned else self._rotation, self._cut
        if rotation is not None and kind == "weight" and not spec.hidden_norm:
            if spec.norm is not None:
                gain_D = effective_gain(self._read(f"{spec.norm.format(i=target.layer)}.weight"), family)
            if fold is None or not fold.rank:
                rotation, cut = self._rotation_kept, self._kept_first
                fold = _cut_fold(fold, self._cut.kept) if fold else None
                update = _cut_update(update, target, self._cut.kept) if update else None
        return Job(
            target=target,
            family=family,
            cut=cut,
            fused=fuse(spec, cut.kept, fold, update) if spec.has_hidden(kind) and not spec.hidden_norm else None,
            rotation=rotation,
            gain_D=gain_D,
            tied_scale_K=self._tied_scale() if module == FINAL_NORM else None,
            trained_gain=gain.to(self._device, self._compute) if gain is not None else None,
            embedding=self._embedding,
        )

    def _tied_scale(self) -> Tensor | None:
        """s of the kept channels (K,) of an embedding that stays tied to the head."""
        fold = self._run.plan.folds.get(EMBEDDING)
        if not self._run.base.tied or fold is None or unties_head(self._run):
            return None
        return fold.scale_D.to(self._device, self._compute)[self._cut.kept]


def _fold_on(fold: HybridFold, device: str) -> HybridFold:
    return HybridFold(l0_RD=fold.l0_RD.to(device), l1_DR=fold.l1_DR.to(device), scale_D=fold.scale_D.to(device))


def _update_on(update: LoraUpdate, target: Target, device: str, dtype: torch.dtype) -> LoraUpdate:
    """The update with what stays along the dimension that is not the residual stream's."""
    a_RI, b_OR = update.a_RI.to(device, dtype), update.b_OR.to(device, dtype)
    rows, columns = target.kept
    if target.spec.hidden_dimension == 0:
        return replace(update, a_RI=a_RI if columns is None else a_RI[:, columns.to(device)], b_OR=b_OR)
    return replace(update, a_RI=a_RI, b_OR=b_OR if rows is None else b_OR[rows.to(device)])


def _cut_fold(fold: HybridFold, kept: Tensor) -> HybridFold:
    """A diagonal operator on the kept channels alone."""
    return HybridFold(l0_RD=fold.l0_RD[:, kept], l1_DR=fold.l1_DR[kept], scale_D=fold.scale_D[kept])


def _cut_update(update: LoraUpdate, target: Target, kept: Tensor) -> LoraUpdate:
    """The update of a weight that has only the kept channels of its hidden axis."""
    if target.spec.hidden_dimension == 0:
        return replace(update, b_OR=update.b_OR[kept])
    return replace(update, a_RI=update.a_RI[:, kept])
