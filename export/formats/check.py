"""The tensors of an 8-bit export, held against the float32 ones that they were rounded from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pat_serve.checkpoints.shards import read_tensors
from pat_serve.errors import ParityError
from pat_serve.export.formats.quantize import HEADER_DTYPES, is_quantized
from pat_serve.export.formats.schemes import INT8, SCALE_SUFFIX, Scheme, dequantize_channels, quantize_channels
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.rounding import REORDERING, is_nearest
from pat_serve.export.run.reader import Run
from pat_serve.terminal.progress import track


def check_eight_bits(run: Run, folder: Path, scheme: Scheme, model_dtype: torch.dtype) -> None:
    """Every weight is the scheme's nearest value of the rewriting, up to what another order of additions can change.

    Args:
        run: the run that they come from.
        folder: with the files.
        scheme: of the linears of the decoder layers.
        model_dtype: dtype of all other tensors.

    Raises:
        ParityError: one is not, is missing, or has no place in the model.
        BrokenCheckpoint: a file is damaged.
    """
    dtypes = {text: dtype for dtype, text in HEADER_DTYPES.items()}
    found = read_tensors(folder, folder, lambda _: False, dtypes)
    rewriting = Rewriting(run, torch.float32, model_dtype)
    shapes = rewriting.shapes
    scales = {name + SCALE_SUFFIX for name, shape in shapes.items() if is_quantized(name, shape)}
    if odd := sorted(found.keys() ^ (shapes.keys() | scales)):
        raise _other(folder, odd[0], "no such tensor" if odd[0] not in found else "a tensor of no place in the model")
    for name, exact in track(rewriting.tensors(), f"parity: {scheme.name}", len(shapes)):
        stored = found[name].read()
        if is_quantized(name, shapes[name]):
            near = _is_quantized_from(exact, stored, found[name + SCALE_SUFFIX].read(), scheme)
        else:
            near = stored.dtype == model_dtype and is_nearest(exact, stored)
        if not near:
            raise _other(folder, name, "another one")


def _is_quantized_from(exact_OI: Tensor, stored_OI: Tensor, scale_O1: Tensor, scheme: Scheme) -> bool:
    _, wanted_O1 = quantize_channels(exact_OI, scheme)
    fits = stored_OI.dtype == scheme.dtype and stored_OI.shape == exact_OI.shape
    if not fits or scale_O1.dtype != torch.float32 or scale_O1.shape != wanted_O1.shape:
        return False
    slack = REORDERING * exact_OI.abs().max()
    # e4m3 has 3 bits of mantissa, and steps of 2**-9 below its least normal number.
    half_OI = scale_O1 / 2 if scheme is INT8 else torch.maximum(exact_OI.abs() / 16, scale_O1 * 2**-10)
    off_OI = (dequantize_channels(stored_OI, scale_O1) - exact_OI).abs()
    scaled = (scale_O1 - wanted_O1).abs() * scheme.largest <= slack
    return bool(scaled.all() and (off_OI <= half_OI * (1 + 1e-6) + slack).all())


def _other(folder: Path, name: str, found: str) -> ParityError:
    return ParityError(
        folder,
        expected=f"{name} to be the float32 tensor in the format that was exported",
        found=found,
        fix="The files are not the model that was trained.",
    )
