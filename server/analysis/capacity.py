"""The number of requests that fit into memory beside a model's weights. Pure mathematics.

A narrower model leaves more of a fixed memory to the KV cache. More requests then share a step, so the model serves
more even where a step itself is hardly faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from pat_serve.shapes.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A model's share of a memory budget.

    Attributes:
        memory_bytes: the budget, for weights and KV cache together.
        weight_bytes: bytes of all parameters.
        kv_bytes_per_request: KV cache of one request to its last token.
        requests: requests in flight whose KV cache fits beside the weights.
    """

    memory_bytes: int
    weight_bytes: int
    kv_bytes_per_request: int
    requests: int


def memory_for(sizes: ModelSizes, *, requests: int, tokens: int, dtype_bytes: int) -> int:
    """Bytes of weights and of so many requests' KV caches.

    Args:
        sizes: of the model.
        requests: in flight.
        tokens: prompt and output of each.
        dtype_bytes: bytes of a weight and of a KV value.
    """
    return sizes.weight_bytes(dtype_bytes) + dtype_bytes * requests * tokens * sizes.kv_values_per_token


def capacity(sizes: ModelSizes, *, memory_bytes: int, tokens: int, dtype_bytes: int) -> Capacity:
    """The capacity of a budget: no request where the weights alone are too big. Arguments as `memory_for`."""
    weights = sizes.weight_bytes(dtype_bytes)
    per_request = dtype_bytes * tokens * sizes.kv_values_per_token
    return Capacity(
        memory_bytes=memory_bytes,
        weight_bytes=weights,
        kv_bytes_per_request=per_request,
        requests=max(0, (memory_bytes - weights) // per_request),
    )
