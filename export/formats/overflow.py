"""Round to narrower floats without turning a number into infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from pat_serve.errors import BrokenCheckpoint


def round_floats(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a tensor to a narrower dtype.

    Raises:
        BrokenCheckpoint: a finite value would become infinite: float16 ends at 65504.
    """
    rounded = tensor.to(dtype)
    if dtype != torch.float16:  # the others reach as far as float32
        return rounded
    if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(tensor).all()):
        largest = float(tensor.abs().max())
        raise BrokenCheckpoint(
            name,
            expected=f"values up to {torch.finfo(dtype).max:g}, the largest {str(dtype).removeprefix('torch.')}",
            found=f"{largest:g}",
            fix="Export with --dtype bfloat16 or float32.",
        )
    return rounded
