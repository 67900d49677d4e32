"""The tensors of a quantised export, held against the float32 ones that they were rounded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pat_serve.checkpoints.shards import TensorEntry, read_tensors
from pat_serve.errors import ParityError
from pat_serve.export.formats.gptq import dequantize_groups, unpack_codes
from pat_serve.export.formats.quantize import HEADER_DTYPES, is_quantized
from pat_serve.export.formats.schemes import (
    INT8,
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    SHAPE_SUFFIX,
    Scheme,
    dequantize_channels,
    quantize_channels,
)
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.rounding import REORDERING, is_rounded
from pat_serve.export.run.reader import Run
from pat_serve.terminal.progress import track

# GPTQ moves a weight away from its nearest value, for the sake of the outputs, and another machine's sums may round one
# otherwise. So a channel's distance is bounded, by several times what four bits cost a normal distribution (0.1).
_FOUR_BITS_DISTANCE = 0.5


def check_quantized(run: Run, folder: Path, scheme: Scheme, model_dtype: torch.dtype) -> None:
    """Every 8-bit weight is the scheme's nearest value of the rewriting, up to another order of additions.

    Four-bit weights depend on the calibration too. Every output channel is near the rewriting's, by its norm.

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
    wanted = {
        name + suffix
        for name, shape in shapes.items()
        for suffix in (scheme.parts(shape, model_dtype) if is_quantized(name, shape) else [""])
    }
    if odd := sorted(found.keys() ^ wanted):
        raise _other(folder, odd[0], "no such tensor" if odd[0] not in found else "a tensor of no place in the model")
    for name, exact in track(rewriting.tensors(), f"parity: {scheme.name}", len(shapes)):
        if not is_quantized(name, shapes[name]):
            stored = found[name].read()
            near = stored.dtype == model_dtype and is_rounded(exact, stored)
        elif scheme.calibrated:
            near = _is_near(exact, found, name, scheme, model_dtype)
        else:
            near = _is_quantized_from(exact, found[name].read(), found[name + SCALE_SUFFIX].read(), scheme)
        if not near:
            raise _other(folder, name, "another one")


def _is_near(
    exact_OI: Tensor, found: Mapping[str, TensorEntry], name: str, scheme: Scheme, model_dtype: torch.dtype
) -> bool:
    parts = {suffix: found[name + suffix] for suffix in scheme.parts(tuple(exact_OI.shape), model_dtype)}
    stored = {suffix: (entry.dtype, entry.shape) for suffix, entry in parts.items()}
    if stored != scheme.parts(tuple(exact_OI.shape), model_dtype):
        return False
    if parts[SHAPE_SUFFIX].read().tolist() != list(exact_OI.shape):
        return False
    scale_OG = parts[SCALE_SUFFIX].read()
    off_OI = dequantize_groups(unpack_codes(parts[PACKED_SUFFIX].read()), scale_OG) - exact_OI
    # A NaN is not near.
    return bool((off_OI.norm(dim=1) <= _FOUR_BITS_DISTANCE * exact_OI.norm(dim=1)).all())


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
