"""The best speed-up that a narrower model can have: bytes and FLOPs counted from the config. Pure mathematics.

A decode step does a few operations for each weight that it reads, so its ceiling is the ratio of bytes read: all
matrices once, plus every request's KV cache. A prefill reuses each weight for all tokens of the batch, so its ceiling
is the ratio of FLOPs. Cutting the hidden dimension cuts every matrix in proportion, but neither the KV cache nor the
attention's own products, which is why the ceiling falls with batch and context.
"""

from __future__ import annotations

from pat_serve.shapes.sizes import ModelSizes, decode_bytes


def prefill_flops(sizes: ModelSizes, *, batch_size: int, prompt_tokens: int) -> float:
    """FLOPs up to the first token of each request: 2 per weight and token, causal attention, lm_head once a request.

    Args:
        sizes: of the model.
        batch_size: requests.
        prompt_tokens: tokens of each prompt.
    """
    matrices = 2 * sizes.layers * sizes.layer_weights * prompt_tokens
    # A token meets itself and all before it: n (n + 1) / 2 pairs, each a product with a key and one with a value.
    pairs = prompt_tokens * (prompt_tokens + 1) / 2
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * pairs
    return batch_size * (matrices + attention + 2 * sizes.head_weights)


def decode_ceiling(
    baseline: ModelSizes, candidate: ModelSizes, *, batch_size: int, context_tokens: float, dtype_bytes: int
) -> float:
    """Largest decode speed-up that a machine bound by memory bandwidth can show."""
    return decode_bytes(
        baseline, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=dtype_bytes
    ) / decode_bytes(candidate, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=dtype_bytes)


def prefill_ceiling(baseline: ModelSizes, candidate: ModelSizes, *, batch_size: int, prompt_tokens: int) -> float:
    """Largest prefill speed-up that a machine bound by arithmetic can show."""
    return prefill_flops(baseline, batch_size=batch_size, prompt_tokens=prompt_tokens) / prefill_flops(
        candidate, batch_size=batch_size, prompt_tokens=prompt_tokens
    )


def decode_flops(sizes: ModelSizes, *, batch_size: int, context_tokens: float) -> float:
    """FLOPs of one decode step: 2 per weight and request, and the attention over each request's context."""
    matrices = 2 * (sizes.layers * sizes.layer_weights + sizes.head_weights)
    return batch_size * (matrices + 4 * sizes.layers * sizes.heads * sizes.head_dim * context_tokens)


def prefill_bytes(sizes: ModelSizes, *, batch_size: int, prompt_tokens: int, dtype_bytes: int) -> float:
    """Bytes that a prefill must read at least: all matrices once, an embedding row a token, and the KV values."""
    others = sizes.norm_weights + sizes.head_weights
    tokens = batch_size * prompt_tokens * (sizes.hidden + sizes.kv_values_per_token)
    return sizes.layers * sizes.layer_bytes(dtype_bytes) + dtype_bytes * (others + tokens)
