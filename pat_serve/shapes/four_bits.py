"""Four-bit weights on a CPU: vLLM has no kernel for them in float32, and zentorch's is the fast one on AMD's CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.errors import UsageError
from pat_serve.machine.hardware import lacks_zen_kernels
from pat_serve.shapes.sizes import stored_bytes
from pat_serve.terminal.progress import say

_FLOAT32 = ("float32", "float")
_FOUR_BITS_BYTES = 0.5


def check_four_bits(config: Mapping[str, Any], name: str, dtype: str) -> None:
    """Look at a model that vLLM is to run on a CPU, and tell of kernels that are missing.

    Args:
        config: its parsed config.json.
        name: the model's, for the message.
        dtype: that the engine will compute in.

    Raises:
        UsageError: four-bit weights in float32.
    """
    if stored_bytes(config) != _FOUR_BITS_BYTES:
        return
    if dtype in _FLOAT32:
        raise UsageError(
            f"--dtype {dtype}",
            expected=f"bfloat16 or float16, since {name} has 4-bit weights and no CPU kernel in float32",
            found=dtype,
            fix="Give --dtype bfloat16, or use the int8 export on a CPU without 16-bit arithmetic.",
        )
    if lacks_zen_kernels():
        say(f"{name}: 4-bit weights are slow on this CPU without zentorch: `make zen` adds it (docs/benchmarking.md)")
