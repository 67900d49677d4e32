"""Rounding of single tensors to the files' dtype: to the nearest value, by chance, and the check of either.

Nearest values lose an update that is smaller than half a step of the dtype: a base's own values are such values, and a
short training moves few numbers far enough to reach the next. Stochastic rounding keeps it in the mean: a number goes
up or down with the probability that makes its expectation the number itself (Gupta et al., arXiv 1502.02551).
"""

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
    """Checks that every tensor of a folder's files is the rewriting, rounded.

    Attributes:
        folder: folder of the files.
        dtype: dtype of the files.
        out: name of the folder in messages.
        same_machine: compare bit for bit; if False, allow what another order of additions can change.
        stochastic: the files were rounded by chance, and not to the nearest values.
    """

    folder: Path
    dtype: torch.dtype
    out: Path
    same_machine: bool = True
    stochastic: bool = False

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
            if found is None or not self._equal(exact, found, name):
                where = f" in {files.tensors[name].shard.name}" if found is not None else ""
                raise ParityError(
                    self.out,
                    expected=f"{name} to be the rewritten tensor, rounded to {str(self.dtype).removeprefix('torch.')}",
                    found="no such tensor" if found is None else f"another one{where}",
                    fix="The file was changed after it was written. Export again; if it happens again, check the disk.",
                )
            yield name, exact

    def _equal(self, exact: Tensor, found: Tensor, name: str) -> bool:
        if not self.same_machine:
            return is_rounded(exact, found, steps=1.0 if self.stochastic else 0.5)
        return torch.equal(Rounding(name, self.dtype, stochastic=self.stochastic).round(exact), found)


class Rounding:
    """Rounds one tensor, part after part.

    Args:
        name: of the tensor, which seeds its draws: they are the same on every machine, whatever the parts.
        dtype: of the files.
        stochastic: round by chance; a dtype of more than 16 bits is always rounded to the nearest value.
    """

    def __init__(self, name: str, dtype: torch.dtype, *, stochastic: bool) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode())) if stochastic else None
        self.stochastic = stochastic and dtype.itemsize == 2

    def round(self, part: Tensor) -> Tensor:
        """The next numbers of the tensor in its own order, in the files' dtype.

        Args:
            part: contiguous, of a wider dtype; left as it is.
        """
        nearest = part.to(self._dtype).contiguous()
        if self.stochastic and not part.is_meta and part.dtype != self._dtype:
            flat, rounded = part.reshape(-1), nearest.view(-1)
            parts = zip(torch.split(flat, _RANDOM_NUMBERS), torch.split(rounded, _RANDOM_NUMBERS), strict=True)
            for exact, place in parts:
                _draw(exact, place, self._generator)
        return nearest


def _draw(exact: Tensor, nearest: Tensor, generator: torch.Generator | None) -> None:
    """Give some numbers their second nearest value in place, each with the probability that keeps its mean."""
    missed = exact - nearest.to(exact.dtype)
    # Bits without the sign are in the order of the floats. The next one after zero has the sign of what was missed.
    bits = nearest.view(torch.int16)
    away = (missed < 0) == (bits < 0)
    from_zero = torch.where(missed < 0, -0x7FFF, 1).to(torch.int16)
    second = torch.where(nearest == 0, from_zero, torch.where(away, bits + 1, bits - 1)).view(nearest.dtype)
    step = second.to(exact.dtype) - nearest.to(exact.dtype)
    draws = torch.rand(exact.shape, generator=generator, dtype=torch.float32)
    # Where nothing was missed, or the second value is infinite, the share is 0 or no number, and neither is drawn.
    nearest.copy_(torch.where(draws < missed / step, second, nearest))


def is_rounded(exact: Tensor, found: Tensor, steps: float = 0.5) -> bool:
    """Tell whether a tensor is another one rounded to its dtype, up to the effect of another order of additions.

    Args:
        exact: the tensor.
        found: in the narrower dtype.
        steps: how far it may lie: half a step to the nearest value, a whole one to either neighbour.
    """
    if found.shape != exact.shape or not found.dtype.is_floating_point:
        return False
    limits = torch.finfo(found.dtype)
    # Below the least normal number steps get no smaller: float16's end at 6e-8.
    step = (exact.abs() * limits.eps).clamp(min=limits.tiny * limits.eps)
    allowed = steps * step * (1 + 1e-6) + REORDERING * exact.abs().max()
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
