"""Rewrite a base's tensors in blocks of a megabyte, so that memory holds little more than one block.

Each step is `rotate_tensor` and `rewrite_tensor` on some rows or columns: no formula of the export stands here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from pat_serve.architectures import EMBEDDING, FINAL_NORM, HEAD
from pat_serve.axes import HIDDEN
from pat_serve.checkpoints.shards import TensorEntry, broken
from pat_serve.cuts import AxisCut
from pat_serve.errors import UsageError
from pat_serve.export.rewrite.rewrite import Fused, fuse, rewrite_tensor
from pat_serve.export.run.adapter import LoraUpdate
from pat_serve.export.run.reader import Run
from pat_serve.family import TensorSpec
from pat_serve.hybrid import HybridFold
from pat_serve.rotation import effective_gain, rotate_tensor

# 1 MB in float32: what the caches of a core hold, and what malloc keeps instead of giving it back to the kernel, which
# would have to clear the pages again for every block.
_BLOCK_NUMBERS = 1 << 18
# 8 MB for products of a rank of hundreds: twice as fast as in blocks of 1 MB, which leave a core's multiplications
# waiting for the operator's own numbers.
_PRODUCT_NUMBERS = 1 << 21


class Scratch:
    """Memory that one thread reads and writes its tensors in, kept from tensor to tensor.

    A fresh allocation of a hundred megabytes costs more in page faults than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, use: str, size_bytes: int) -> Tensor:
        """So many bytes for one use; what they held before is lost."""
        memory = self._memory.get(use)
        if memory is None or len(memory) < size_bytes:
            self._memory.pop(use, None)
            memory = self._memory[use] = torch.empty(size_bytes, dtype=torch.uint8)
        return memory[:size_bytes]

    def tensor(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the memory of one use."""
        return self.take(use, prod(shape) * dtype.itemsize).view(dtype).view(shape)


class Rewriting:
    """The rewriting of a run's tensors in blocks of a megabyte; safe to share between threads.

    Rows of an embedding, a reader or a head are rewritten independently of each other. A residual writer's operator
    mixes its rows, but its columns are independent: it is read whole as it is stored, rewritten in runs of columns, and
    comes out as one block.

    Args:
        run: the run to export.
        dtype: to write.
        embedding: the factor of a scaled embedding, 1 for others.
        unties_head: the head is the base's raw embedding.
        zero_biases: names of the biases that the export has and the base has not.
        device: "meta" computes shapes and dtypes alone, and reads no weight.
    """

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype,
        *,
        embedding: float,
        unties_head: bool,
        zero_biases: Iterable[str],
        device: str = "cpu",
    ) -> None:
        self._run = run
        self._dtype = dtype
        self._device = device
        # The meta device has no memory to spare, and takes milliseconds for each operation.
        self._block_numbers = _BLOCK_NUMBERS if device != "meta" else 1 << 62
        self._product_numbers = max(_PRODUCT_NUMBERS, self._block_numbers)
        self._compute = torch.float64 if torch.float64 in (run.base.dtype, dtype) else torch.float32
        cut = run.plan.cuts[HIDDEN]
        self._cut = AxisCut(width=cut.width, kept=cut.kept.to(device))
        self._kept_first = AxisCut(width=cut.width, kept=torch.arange(len(cut.kept), device=device))
        self._embedding = embedding
        self._unties_head = unties_head
        self._zero_biases = frozenset(zero_biases)
        rotation = run.plan.rotation
        self._rotation = None if rotation is None else rotation.to(device, self._compute)
        # Computing the columns that are cut would be a quarter of all work.
        self._rotation_kept = None if self._rotation is None else self._rotation[:, self._cut.kept].contiguous()

    def blocks(self, name: str, scratch: Scratch) -> Iterator[Tensor]:
        """The rows of one exported tensor in order, in the dtype to write.

        Args:
            name: one of `narrow_shapes`.
            scratch: of the calling thread. A block lies in it: it is gone when the next one is asked for.

        Raises:
            BrokenCheckpoint: the base's tensor holds a NaN or an infinity.
            UsageError: the dtype cannot hold a result.
        """
        run = self._run
        if name in self._zero_biases:
            yield torch.zeros(len(self._cut.kept), dtype=self._dtype, device=self._device)
            return
        raw_head = name == f"{HEAD}.weight" and self._unties_head
        entry = run.base.tensors[f"{EMBEDDING}.weight" if raw_head else name]
        job = self._job(name)
        if job.spec.hidden_dimension != 0 and len(entry.shape) == 2:
            rows = max(1, (self._product_numbers if job.thick else self._block_numbers) // entry.shape[1])
            for start in range(0, entry.shape[0], rows):
                stop = min(start + rows, entry.shape[0])
                block = self._read(entry, name, scratch, start, stop)
                narrow = self._rewrite(block, job.part(start, stop), scratch)
                yield self._checked(narrow.to(self._dtype).contiguous(), name)
        elif len(entry.shape) == 2:
            yield self._columns(entry, name, job, scratch)
        else:
            narrow = self._rewrite(self._read(entry, name, scratch), job, scratch)
            yield self._checked(narrow.to(self._dtype).contiguous(), name)

    def _columns(self, entry: TensorEntry, name: str, job: _Job, scratch: Scratch) -> Tensor:
        """A residual writer (D, n), rewritten in runs of columns to (K, n)."""
        width = entry.shape[1]
        shape = (len(self._cut.kept), width)
        if self._device == "meta":
            narrow = torch.empty(shape, dtype=self._dtype, device="meta")
        else:
            narrow = scratch.tensor("output", shape, self._dtype)
        stored = self._stored(entry, scratch)
        columns = max(1, (self._product_numbers if job.thick else self._block_numbers) // entry.shape[0])
        for start in range(0, width, columns):
            stop = min(start + columns, width)
            block = self._finite(self._widened(stored[:, start:stop], scratch), entry, name)
            narrow[:, start:stop] = self._rewrite(block, job.part(start, stop), scratch)
        return self._checked(narrow, name)

    def _widened(self, stored: Tensor, scratch: Scratch) -> Tensor:
        """The same numbers in the dtype to compute in."""
        if stored.is_meta or stored.dtype == self._compute:
            return stored.to(self._compute)
        return scratch.tensor("wide", tuple(stored.shape), self._compute).copy_(stored)

    def _rewrite(self, tensor: Tensor, job: _Job, scratch: Scratch) -> Tensor:
        if job.trained_gain is not None:
            # Of the turned stream, where it is turned.
            tensor = job.trained_gain
        elif job.rotation is not None:
            tensor = rotate_tensor(tensor, job.spec, self._run.base.family, job.rotation, job.gain_D)
        out = None
        if job.fused is not None and tensor.dim() == 2 and not tensor.is_meta:
            shape = list(tensor.shape)
            shape[0 if job.fused.first else 1] = len(job.fused.kept)
            out = scratch.tensor("narrow", tuple(shape), self._compute)
        return rewrite_tensor(
            tensor,
            job.spec,
            job.cut,
            fused=job.fused,
            norm_offset=self._run.base.family.norm_offset,
            embedding=self._embedding,
            tied_scale_K=job.tied_scale_K,
            out=out,
        )

    def _job(self, name: str) -> _Job:
        """What a tensor's rewriting needs beside the tensor."""
        run, family = self._run, self._run.base.family
        spec, layer, kind = family.match(name)
        module = name.rpartition(".")[0]
        fold = run.plan.folds.get(module)
        fold = _fold_on(fold.to(self._compute), self._device) if fold else None
        update = run.adapter.get(module) if kind == "weight" else None
        update = _update_on(update, self._device, self._compute) if update else None
        gain = run.plan.norms.get(module) if kind == "weight" else None
        gain_D, rotation, cut = None, self._rotation, self._cut
        if rotation is not None and kind == "weight" and not spec.hidden_norm:
            if spec.norm is not None:
                norm = f"{spec.norm.format(i=layer)}.weight"
                gain_D = effective_gain(self._read(run.base.tensors[norm], norm, Scratch()), family)
            if fold is None or not fold.rank:
                rotation, cut = self._rotation_kept, self._kept_first
                fold = _cut_fold(fold, self._cut.kept) if fold else None
                update = _cut_update(update, spec, self._cut.kept) if update else None
        return _Job(
            spec=spec,
            cut=cut,
            fused=fuse(spec, cut.kept, fold, update) if spec.has_hidden(kind) and not spec.hidden_norm else None,
            rotation=rotation,
            gain_D=gain_D,
            tied_scale_K=self._tied_scale() if module == FINAL_NORM else None,
            trained_gain=gain.to(self._device, self._compute) if gain is not None else None,
        )

    def _tied_scale(self) -> Tensor | None:
        """s of the kept channels (K,) of an embedding that stays tied to the head."""
        fold = self._run.plan.folds.get(EMBEDDING)
        if not self._run.base.tied or fold is None or self._unties_head:
            return None
        return fold.scale_D.to(self._device, self._compute)[self._cut.kept]

    def _read(self, entry: TensorEntry, name: str, scratch: Scratch, start: int = 0, stop: int | None = None) -> Tensor:
        return self._finite(self._widened(self._stored(entry, scratch, start, stop), scratch), entry, name)

    def _stored(self, entry: TensorEntry, scratch: Scratch, start: int = 0, stop: int | None = None) -> Tensor:
        stop = entry.shape[0] if stop is None else stop
        shape = (stop - start, *entry.shape[1:])
        if self._device == "meta":
            return torch.empty(shape, dtype=entry.dtype, device="meta")
        return entry.read(start, stop, scratch.take("input", prod(shape) * entry.dtype.itemsize))

    def _finite(self, tensor: Tensor, entry: TensorEntry, name: str) -> Tensor:
        if not _all_finite(tensor):
            raise broken(entry.shard, f"finite numbers in {name}", "NaN or infinity")
        return tensor

    def _checked(self, tensor: Tensor, name: str) -> Tensor:
        if not _all_finite(tensor):
            raise UsageError(
                "--dtype",
                expected=f"one that holds {name}",
                found=f"{str(self._dtype).removeprefix('torch.')}, which ends at {torch.finfo(self._dtype).max:.3g}",
                fix="Choose --dtype bfloat16 or float32.",
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One tensor's line in the table, and what is to be folded into it."""

    spec: TensorSpec
    cut: AxisCut
    fused: Fused | None
    rotation: Tensor | None
    gain_D: Tensor | None
    tied_scale_K: Tensor | None
    trained_gain: Tensor | None

    @property
    def thick(self) -> bool:
        """Its products are many to a number: they want large blocks."""
        return self.rotation is not None or (self.fused is not None and self.fused.l0_RD is not None)

    def part(self, start: int, stop: int) -> _Job:
        """The same for some rows of a weight whose rows are independent, or some columns of one whose columns are."""
        return replace(self, fused=self.fused.part(start, stop)) if self.fused else self


def _all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; the extremes are NaN if any number is, and take one pass."""
    return tensor.is_meta or not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _fold_on(fold: HybridFold, device: str) -> HybridFold:
    return HybridFold(l0_RD=fold.l0_RD.to(device), l1_DR=fold.l1_DR.to(device), scale_D=fold.scale_D.to(device))


def _update_on(update: LoraUpdate, device: str, dtype: torch.dtype) -> LoraUpdate:
    return replace(update, a_RI=update.a_RI.to(device, dtype), b_OR=update.b_OR.to(device, dtype))


def _cut_fold(fold: HybridFold, kept: Tensor) -> HybridFold:
    """A diagonal operator on the kept channels alone."""
    return HybridFold(l0_RD=fold.l0_RD[:, kept], l1_DR=fold.l1_DR[kept], scale_D=fold.scale_D[kept])


def _cut_update(update: LoraUpdate, spec: TensorSpec, kept: Tensor) -> LoraUpdate:
    """The update of a weight that has only the kept channels of its hidden axis."""
    if spec.hidden_dimension == 0:
        return replace(update, b_OR=update.b_OR[kept])
    return replace(update, a_RI=update.a_RI[:, kept])
