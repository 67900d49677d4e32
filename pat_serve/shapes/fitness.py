"""Judge a model's shape: tensor-parallel degrees, kernels, quantisation groups. Pure arithmetic.

The rules are vLLM 0.32's; `tests/test_geometry.py` asks its own functions and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pat_serve.shapes.geometry import fast_tile, legal_step, name_widths, widths_around
from pat_serve.shapes.sizes import ModelSizes

# v1/attention/backends/cpu_attn.py
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
GROUP_SIZES = (32, 64, 128)
# vLLM pads the vocabulary to this before it splits it.
_VOCAB_PADDING = 64
_CPU_VECTOR = 8
_TENSOR_CORE = 64
_CUTLASS = 16
_AMX_DEPTH = 32
_PACKED_TILE = 32


def tensor_parallel_obstacles(sizes: ModelSizes, degree: int) -> list[str]:
    """Why vLLM cannot split a model over `degree` devices; empty when it can.

    The hidden width is no obstacle: every device holds all of it; what is split is heads,
    feed-forward channels and vocabulary.
    """
    found = []
    heads, kv_heads, padded = sizes.heads, sizes.kv_heads, _padded(sizes.vocab)
    if heads % degree:
        found.append(f"{heads} heads are no multiple of {degree}")
    if kv_heads % degree and degree % kv_heads:
        found.append(f"{kv_heads} key-value heads neither divide by {degree} nor divide it")
    if sizes.ffn % degree:
        found.append(f"intermediate_size {sizes.ffn} is no multiple of {degree}")
    if padded % degree:
        found.append(f"the vocabulary, padded to {padded}, is no multiple of {degree}")
    return found


def tensor_parallel_degrees(sizes: ModelSizes) -> list[int]:
    """The degrees up to the number of heads at which vLLM can serve a model."""
    degrees = range(1, sizes.heads + 1)
    return [degree for degree in degrees if not tensor_parallel_obstacles(sizes, degree)]


def linear_inputs(sizes: ModelSizes, degree: int = 1) -> tuple[int, int, int]:
    """Inputs that a device has of the readers of the stream, of attention's output and of the MLP's."""
    return sizes.hidden, sizes.heads * sizes.head_dim // degree, sizes.ffn // degree


def group_sizes(sizes: ModelSizes, degrees: Sequence[int] = (1,)) -> list[int]:
    """Group sizes of 4-bit formats (GPTQ, AWQ) that fit every linear of a model, at every degree."""
    inputs = {length for degree in degrees or (1,) for length in linear_inputs(sizes, degree)}
    return [size for size in GROUP_SIZES if all(length % size == 0 for length in inputs)]


def slow_width(
    base_hidden: int,
    exported: ModelSizes,
    *,
    hidden_multiple_of_heads: bool,
    parameters: Callable[[int], int] | None = None,
) -> str | None:
    """Say in a sentence why a legal width is slow and which widths are not; None for a fast width.

    Narrow bases, and those with an odd number of heads, have too few multiples of 64 to ask for one: there a smaller
    tile is asked for, or nothing but a legal width.

    Args:
        base_hidden: D, the width of the base.
        exported: sizes of the export, K wide.
        hidden_multiple_of_heads: the config class of the export wants it.
        parameters: number of parameters of an export of a width, for the message; by default counted from the sizes,
            without biases and norms over heads.
    """
    width, rule = exported.hidden, hidden_multiple_of_heads
    finest = fast_tile(base_hidden, exported.heads, hidden_multiple_of_heads=rule)
    tile = min(_TENSOR_CORE, finest or 1)
    if width % tile == 0:
        return None
    step = math.lcm(tile, legal_step(exported.heads, hidden_multiple_of_heads=rule))
    near = widths_around(width, step, base_hidden)
    count = parameters or (lambda other: replace(exported, hidden=other).parameters)
    return (
        f"hidden_size {width} is no multiple of {tile}, so matrix tiles of GPUs and AMX are partly empty; "
        f"the nearest multiples are {name_widths(near, count)}"
    )


def cautions(exported: ModelSizes, degrees: Sequence[int] = (1,), *, bits: int | None = None) -> list[str]:
    """Say in sentences which parts of a shape load but run slowly, or not everywhere.

    Args:
        exported: sizes of the export; `slow_width` judges its width.
        degrees: tensor-parallel degrees to think of.
        bits: of a weight of the linears, where they are quantised.
    """
    found = []
    head_dim, ffn = exported.head_dim, exported.ffn
    if head_dim not in CPU_HEAD_DIMS:
        found.append(f"vLLM's CPU attention has no kernel for head_dim {head_dim} (as in the base)")
    if head_dim % 8 or head_dim > 256:
        found.append(f"vLLM's FlashAttention has no kernel for head_dim {head_dim} (as in the base)")
    for degree in degrees or (1,):
        at = f" at {degree}-fold tensor parallelism" if degree > 1 else ""
        if (ffn // degree) % _CPU_VECTOR:
            found.append(f"vLLM's CPU kernels refuse {ffn // degree} feed-forward channels{at}: no multiple of 8")
        if bits is None:
            continue
        for depth, rows in set(_linears(exported, degree)):
            if bits == 4:
                if depth % _PACKED_TILE or rows % _PACKED_TILE:
                    found.append(f"a linear of {rows} x {depth}{at} is not in 32s: vLLM has no 4-bit CPU kernel for it")
            elif depth % _CUTLASS or rows % _CUTLASS:
                found.append(f"a linear of {rows} x {depth}{at} is not in 16s: no CUTLASS kernel, so slower on GPUs")
            elif depth % _AMX_DEPTH:
                found.append(f"a linear of {rows} x {depth}{at} is not 32s deep: no AMX kernel, so slower on CPUs")
    return found


def _linears(sizes: ModelSizes, degree: int) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of every linear on one device."""
    queries = sizes.heads * sizes.head_dim // degree
    keys = max(1, sizes.kv_heads // degree) * sizes.head_dim
    yield sizes.hidden, queries + 2 * keys
    yield queries, sizes.hidden
    yield sizes.hidden, 2 * (sizes.ffn // degree)
    yield sizes.ffn // degree, sizes.hidden


def _padded(vocab: int) -> int:
    return -(-vocab // _VOCAB_PADDING) * _VOCAB_PADDING
