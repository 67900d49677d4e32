"""Rounding of single tensors to the files' dtype: the values that are right, and a random rounding."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import ParityError

# Another machine, or another number of threads, adds float32 products in another order, which may tip a rounding.
REORDERING = 1e-5
# So few numbers fit into a core's cache, and avoid a second copy of an embedding.
_RANDOM_NUMBERS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """Checks that every tensor of a folder's files is the rewriting's nearest value.

    Attributes:
        folder: folder of the files.
        dtype: dtype of the files.
        out: name of the folder in messages.
        same_machine: compare bit for bit; if False, allow what another order of additions can change.
    """

    folder: Path
    dtype: torch.dtype
    out: Path
    same_machine: bool = True

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hand the rewriting's tensors on, each after the comparison with the files' tensor.

        Args:
            tensors: by name, in float32, or float64 for float64 files.

        Raises:
            ParityError: a tensor of the files differs or is missing.
        """
        files = open_checkpoint(str(self.folder))
        for name, exact in tensors:
            found = files.read(name) if name in files.tensors else None
            if found is None or not self._equal(exact, found):
                where = f" in {files.tensors[name].shard.name}" if found is not None else ""
                raise ParityError(
                    self.out,
                    expected=f"{name} to be the rewritten tensor, rounded to {str(self.dtype).removeprefix('torch.')}",
                    found="no such tensor" if found is None else f"another one{where}",
                    fix="The file was changed after it was written. Export again; if it happens again, check the disk.",
                )
            yield name, exact

    def _equal(self, exact: Tensor, found: Tensor) -> bool:
        return torch.equal(exact.to(self.dtype), found) if self.same_machine else is_nearest(exact, found)


def is_nearest(exact: Tensor, found: Tensor) -> bool:
    """Tell whether a tensor is another one rounded to its dtype, up to the effect of another order of additions."""
    if found.shape != exact.shape or not found.dtype.is_floating_point:
        return False
    limits = torch.finfo(found.dtype)
    # Below the least normal number steps get no smaller: float16's end at 6e-8.
    half_step = (exact.abs() * (limits.eps / 2)).clamp(min=limits.tiny * limits.eps / 2)
    allowed = half_step * (1 + 1e-6) + REORDERING * exact.abs().max()
    return bool(((exact - found.to(exact.dtype)).abs() <= allowed).all())


def round_at_random(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """Move every number of a tensor, in place, to somewhere within half a step of a narrower dtype.

    Rounding moves a number by as much, to the nearest value. Here a number keeps that dtype's significant bits however
    small or large it is, and zeros stay.

    Args:
        tensor: float32 or float64.
        name: seeds the moves, so that a model is moved alike however it is read.
        dtype: the narrower one.
    """
    exponents, integers = {torch.float32: (0x7F80_0000, torch.int32), torch.float64: (0x7FF << 52, torch.int64)}[
        tensor.dtype
    ]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for part in torch.split(tensor.view(-1), _RANDOM_NUMBERS):
        # With its mantissa gone a number is the power of two below it: a step is that times the dtype's eps.
        step = (part.view(integers) & exponents).view(tensor.dtype).mul_(torch.finfo(dtype).eps)
        part.add_(step.mul_(torch.rand(part.shape, generator=generator, dtype=tensor.dtype).sub_(0.5)))
