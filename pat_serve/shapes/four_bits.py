"""Refuse four-bit weights in float32 on a CPU: vLLM's kernel for them has no float32, and the engine would die."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.errors import UsageError
from pat_serve.shapes.sizes import stored_bytes

_FLOAT32 = ("float32", "float")
_FOUR_BITS_BYTES = 0.5


def check_four_bits(config: Mapping[str, Any], name: str, dtype: str) -> None:
    """Look at a model that vLLM is to run on a CPU.

    Args:
        config: its parsed config.json.
        name: the model's, for the message.
        dtype: that the engine will compute in.

    Raises:
        UsageError: four-bit weights in float32.
    """
    if dtype in _FLOAT32 and stored_bytes(config) == _FOUR_BITS_BYTES:
        raise UsageError(
            f"--dtype {dtype}",
            expected=f"bfloat16 or float16, since {name} has 4-bit weights and no CPU kernel in float32",
            found=dtype,
            fix="Give --dtype bfloat16, or use the int8 export on a CPU without 16-bit arithmetic.",
        )
