"""The memory that an engine is expected to take, and the memory that this machine has left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pat_serve.errors import EngineError
from pat_serve.machine.hardware import DTYPE_BYTES, available_memory_bytes, free_gpu_bytes
from pat_serve.shapes.sizes import ModelSizes

# A step takes up at most so many tokens: larger batches are prefilled in pieces.
MAX_STEP_TOKENS = 16384
# Memory of an engine beside weights and KV cache: Python, torch and vLLM themselves.
PROCESS_BYTES = 1 << 30
# While a CPU's kernels repack a matrix, it exists twice; freed pieces are not all given back.
WEIGHT_COPIES = 1.4
# Rows of 32, 128 and 256 are the block sizes of vLLM's KV cache; one block more than the tokens need is never too few.
_KV_BLOCK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The largest batch that an engine has to hold.

    Attributes:
        requests: under way together.
        prompt_tokens: of each request.
        tokens_per_request: prompt and output of each request.
    """

    requests: int
    prompt_tokens: int
    tokens_per_request: int

    @property
    def step_tokens(self) -> int:
        """Tokens of the widest step: all prompts at once, up to `MAX_STEP_TOKENS`."""
        return min(self.requests * self.prompt_tokens, MAX_STEP_TOKENS)


def engine_memory_bytes(sizes: ModelSizes, batch: Batch, dtype: str) -> int:
    """Memory that an engine is expected to take: weights, KV cache, activations of the widest step, the process."""
    value_bytes = DTYPE_BYTES[dtype]
    widest = max(3 * sizes.ffn, 3 * sizes.heads * sizes.head_dim) + 4 * sizes.hidden
    activations = batch.step_tokens * widest * value_bytes
    copies = WEIGHT_COPIES if free_gpu_bytes() is None else 1.0
    weights = int(copies * sizes.parameters * value_bytes)
    return weights + kv_cache_bytes(sizes, batch, dtype) + activations + PROCESS_BYTES


def kv_cache_bytes(sizes: ModelSizes, batch: Batch, dtype: str) -> int:
    """Size of the KV cache that holds the batch to its last token."""
    blocks = batch.requests * math.ceil(batch.tokens_per_request / _KV_BLOCK_TOKENS) + 1
    return blocks * _KV_BLOCK_TOKENS * sizes.kv_values_per_token * DTYPE_BYTES[dtype]


def free_memory_bytes() -> tuple[int, str]:
    """The memory that is free, and its name: the GPU's if there is one, else the host's."""
    gpu_bytes = free_gpu_bytes()
    return (available_memory_bytes(), "memory") if gpu_bytes is None else (gpu_bytes, "GPU memory")


def require_memory(subject: str, needed_bytes: int, *, dtype: str, fix: str) -> None:
    """Refuse what does not fit into the memory that is free.

    Raises:
        EngineError: with both amounts.
    """
    available_bytes, kind = free_memory_bytes()
    if needed_bytes > available_bytes:
        raise EngineError(
            subject,
            expected=f"about {needed_bytes / 2**30:.1f} GiB of {kind} in {dtype}",
            found=f"{available_bytes / 2**30:.1f} GiB available",
            fix=fix,
        )
