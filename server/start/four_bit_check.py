"""Refuse four-bit weights in float32 on a CPU: vLLM's kernel for them has no float32, and the engine would die."""

from __future__ import annotations

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.errors import UsageError
from pat_serve.shapes.sizes import ModelSizes

_FLOAT32 = ("float32", "float")
_FOUR_BITS_BYTES = 0.5


def check_four_bits(model: str, dtype: str) -> None:
    """Look at a model that a CPU is to serve.

    Args:
        model: folder or hub id.
        dtype: that the engine will compute in.

    Raises:
        UsageError: four-bit weights in float32.
    """
    if dtype not in _FLOAT32:
        return
    folder = locate(model, weights=False)
    config = read_config(folder)
    if config.get("quantization_config") and ModelSizes.of(config, source=folder).linear_bytes == _FOUR_BITS_BYTES:
        raise UsageError(
            f"--dtype {dtype}",
            expected=f"bfloat16 or float16, since {model} has 4-bit weights and no CPU kernel in float32",
            found=dtype,
            fix="Give --dtype bfloat16, or serve the int8 export on a CPU without 16-bit arithmetic.",
        )
