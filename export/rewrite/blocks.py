"""Rewrite a base's tensors in blocks of a megabyte, so that memory holds little more than one block.

Each step is a `Job` on some rows or columns: no formula of the export stands here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from pat_serve.checkpoints.shards import TensorEntry, broken
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import UsageError
from pat_serve.export.rewrite.contents import Zeros, contents, entry_of
from pat_serve.export.rewrite.job import Job, Jobs
from pat_serve.export.rewrite.rounding import Rounding
from pat_serve.export.rewrite.scratch import Scratch
from pat_serve.export.rewrite.stream_width import embedding_factor
from pat_serve.export.run.reader import Run

# 1 MB in float32: what the caches of a core hold, and what malloc keeps instead of giving it back to the kernel, which
# would have to clear the pages again for every block.
_BLOCK_NUMBERS = 1 << 18
# 8 MB for products of a rank of hundreds: twice as fast as in blocks of 1 MB, which leave a core's multiplications
# waiting for the operator's own numbers.
_PRODUCT_NUMBERS = 1 << 21


class Rewriting:
    """The rewriting of a run's tensors in blocks of a megabyte; safe to share between threads.

    Rows of an embedding, a reader or a head are rewritten independently of each other. A residual writer's operator
    mixes its rows, but its columns are independent: it is read whole as it is stored, rewritten in runs of columns, and
    comes out as one block. Rows or columns that are cut are left out before the arithmetic.

    Args:
        run: the run to export.
        dtype: to write. The rewriting itself runs in float32, or in float64 for a float64 base.
        model_dtype: in which the model will run: it rounds the factor of a scaled embedding. `dtype` by default.
        device: "meta" computes shapes and dtypes alone, and reads no weight.
        stochastic: round by chance, and not to the nearest value.

    Attributes:
        shapes: every tensor of the export with its shape, in order.
    """

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype,
        model_dtype: torch.dtype | None = None,
        device: str = "cpu",
        *,
        stochastic: bool = False,
    ) -> None:
        self._run, self._dtype, self._device, self._stochastic = run, dtype, device, stochastic
        # The meta device has no memory to spare, and takes milliseconds for each operation.
        self._block_numbers = _BLOCK_NUMBERS if device != "meta" else 1 << 62
        self._product_numbers = max(_PRODUCT_NUMBERS, self._block_numbers)
        self._compute = torch.float64 if torch.float64 in (run.base.dtype, dtype) else torch.float32
        self._contents = contents(run)
        self.shapes = {name: content.shape for name, content in self._contents.items()}
        cut = run.plan.cuts.line(HIDDEN, None, run.base.sizes)
        embedding = embedding_factor(cut, model_dtype or dtype) if run.base.family.scaled_embedding else 1.0
        self._jobs = Jobs(run, self._compute, embedding, self._gain, device)

    def blocks(self, name: str, scratch: Scratch) -> Iterator[Tensor]:
        """The rows of one exported tensor in order, in the dtype to write.

        Args:
            name: one of `shapes`.
            scratch: of the calling thread. A block lies in it: it is gone when the next one is asked for.

        Raises:
            BrokenCheckpoint: the base's tensor holds a NaN or an infinity.
            UsageError: the dtype cannot hold a result.
        """
        content = self._contents[name]
        if isinstance(content, Zeros):
            yield torch.zeros(content.shape, dtype=self._dtype, device=self._device)
            return
        entry, replaced = entry_of(self._run, content)
        job = self._jobs.job(content, turned=replaced)
        rounding = Rounding(name, self._dtype, stochastic=self._stochastic)
        if len(entry.shape) == 2 and content.spec.hidden_dimension == 0:
            # Draws go by rows, so the columns have to be there before the first.
            dtype = self._compute if rounding.stochastic else self._dtype
            yield self._checked(rounding.round(self._columns(entry, job, scratch, dtype)), name)
            return
        # A norm's or a writer's bias has the hidden axis alone, and the job cuts it.
        rows = content.kept[0] if content.spec.hidden_dimension != 0 else None
        numbers = self._product_numbers if job.thick else self._block_numbers
        step = max(1, numbers // entry.shape[1]) if len(entry.shape) == 2 else entry.shape[0]
        done = 0
        for start in range(0, entry.shape[0], step):
            stop = min(start + step, entry.shape[0])
            places = _between(rows, start, stop)
            if places is not None and not len(places):
                continue
            block = self._read(entry, content.source, scratch, start, stop)
            if places is not None:
                block = self._selected(block, 0, places, scratch)
            narrow = self._rewrite(block, job.part(done, done + len(block)), scratch)
            done += len(block)
            yield self._checked(rounding.round(narrow), name)

    def whole(self, name: str, scratch: Scratch) -> Tensor:
        """One exported tensor in memory of its own; arguments and errors as of `blocks`."""
        whole, done = torch.empty(self.shapes[name], dtype=self._dtype), 0
        for block in self.blocks(name, scratch):
            # A block is gone when the next one is asked for.
            whole[done : done + len(block)] = block
            done += len(block)
        return whole

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All exported tensors, one at a time and whole; what is written to disk goes through `blocks`."""
        scratch = Scratch()
        for name in self.shapes:
            yield name, self.whole(name, scratch)

    def _columns(self, entry: TensorEntry, job: Job, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """A residual writer (D, n), rewritten in runs of its kept columns to (K, kept)."""
        shape, kept = job.target.shape, job.target.kept[1]
        if self._device == "meta":
            narrow = torch.empty(shape, dtype=dtype, device="meta")
        else:
            narrow = scratch.tensor("output", shape, dtype)
        stored = self._stored(entry, scratch)
        columns = max(1, (self._product_numbers if job.thick else self._block_numbers) // entry.shape[0])
        for start in range(0, shape[1], columns):
            stop = min(start + columns, shape[1])
            block = stored[:, start:stop] if kept is None else self._selected(stored, 1, kept[start:stop], scratch)
            block = self._finite(self._widened(block, scratch), entry, job.target.source)
            narrow[:, start:stop] = self._rewrite(block, job.part(start, stop), scratch)
        return narrow

    def _selected(self, tensor: Tensor, dimension: int, places: Tensor, scratch: Scratch) -> Tensor:
        if tensor.is_meta:
            return tensor.index_select(dimension, places.to("meta"))
        shape = list(tensor.shape)
        shape[dimension] = len(places)
        out = scratch.tensor("selected", tuple(shape), tensor.dtype)
        return torch.index_select(tensor, dimension, places, out=out)

    def _widened(self, stored: Tensor, scratch: Scratch) -> Tensor:
        """The same numbers in the dtype to compute in."""
        if stored.is_meta or stored.dtype == self._compute:
            return stored.to(self._compute)
        return scratch.tensor("wide", tuple(stored.shape), self._compute).copy_(stored)

    def _rewrite(self, tensor: Tensor, job: Job, scratch: Scratch) -> Tensor:
        return job.apply(tensor, partial(scratch.tensor, "narrow", dtype=self._compute))

    def _gain(self, name: str) -> Tensor:
        """A norm's stored gain (D,)."""
        return self._read(self._run.base.tensors[name], name, Scratch())

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


def _between(positions: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Ascending positions from start on and below stop, counted from start; None for all."""
    if positions is None:
        return None
    first, last = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
    return positions[first:last] - start


def _all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; the extremes are NaN if any number is, and take one pass."""
    return tensor.is_meta or not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
