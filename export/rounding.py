"""Files are the rewriting's nearest values, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pat_serve.checkpoint import open_checkpoint
from pat_serve.errors import ParityError
from pat_serve.export.narrow import narrow_shapes, narrow_tensors
from pat_serve.export.reader import Run
from pat_serve.progress import track

# Another machine, or another number of threads, adds float32 products in another order: that may tip a rounding.
REORDERING = 1e-5


def check_rounding(run: Run, folder: Path, dtype: torch.dtype, out: Path, *, same_machine: bool = True) -> None:
    """Every tensor of the files is the float32 one's nearest value.

    Args:
        run: the run that they come from.
        folder: with the files.
        dtype: of the files.
        out: how a message calls the folder.
        same_machine: bit for bit; else up to what another order of additions can change.

    Raises:
        ParityError: one is not.
    """
    files = open_checkpoint(str(folder))
    names = list(narrow_shapes(run))
    for name, exact in track(narrow_tensors(run, names, torch.float32, dtype), "parity: rounding", len(names)):
        found = files.read(name) if name in files.tensors else None
        equal = found is not None and (
            torch.equal(exact.to(dtype), found) if same_machine else is_nearest(exact, found)
        )
        if not equal:
            raise ParityError(
                out,
                expected=f"{name} to be the float32 tensor, rounded to {str(dtype).removeprefix('torch.')}",
                found="no such tensor" if found is None else "another one",
                fix="The files are not the model that was trained.",
            )


def is_nearest(exact: Tensor, found: Tensor) -> bool:
    """A tensor is another one rounded to its dtype, up to what another order of additions can change."""
    if found.shape != exact.shape or not found.dtype.is_floating_point:
        return False
    half_step = torch.finfo(found.dtype).eps / 2
    allowed = half_step * (1 + 1e-6) * exact.abs() + REORDERING * exact.abs().max()
    return bool(((exact - found.float()).abs() <= allowed).all())
