"""vLLM has no CPU kernels for some head sizes, nor for four-bit weights in float32.

For four-bit weights zentorch's kernel is the fast one on AMD's CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.errors import UnsupportedModel, UsageError
from pat_serve.machine.hardware import lacks_zen_kernels
from pat_serve.shapes.fitness import CPU_HEAD_DIMS
from pat_serve.shapes.sizes import stored_bytes
from pat_serve.terminal.progress import say

_FLOAT32 = ("float32", "float")
_FOUR_BITS_BYTES = 0.5
# Classes whose heads share the stream evenly where their config names no head_dim.
_EVEN_HEADS = ("llama", "mistral", "qwen2")


def check_cpu_kernels(config: Mapping[str, Any], name: str, dtype: str) -> None:
    """Look at a model that vLLM is to run on a CPU, and tell of kernels that are missing.

    Args:
        config: its parsed config.json.
        name: the model's, for the message.
        dtype: that the engine will compute in.

    Raises:
        UsageError: four-bit weights in float32.
        UnsupportedModel: heads of a size that no attention kernel has. The engine would start, and end at its first
            token.
    """
    head_dim = _head_dim(config)
    if head_dim is not None and head_dim not in CPU_HEAD_DIMS:
        raise UnsupportedModel(
            name,
            expected=f"a head_dim that vLLM's CPU attention has a kernel for: {', '.join(map(str, CPU_HEAD_DIMS))}",
            found=str(head_dim),
            fix="Serve it on a GPU, or take another base: no cut changes the size of a head.",
        )
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


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """Numbers of a head; None where the config does not tell, or where heads are compressed (kv_lora_rank)."""
    if config.get("kv_lora_rank"):
        return None
    if isinstance(named := config.get("head_dim"), int):
        return named
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    # Other classes may have a head of another size by default, as Gemma's and Qwen3's have.
    return width // heads if config.get("model_type") in _EVEN_HEADS and heads and width else None
