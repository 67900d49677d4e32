"""Judge a model's shape: tensor-parallel degrees, kernels, quantisation groups. Pure arithmetic.

The rules are vLLM 0.32's; `tests/test_geometry.py` asks its own functions and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pat_serve.families.architectures import EMBEDDING
from pat_serve.shapes.geometry import fast_tile, legal_step, name_widths, widths_around
from pat_serve.shapes.sizes import ModelShape, ModelSizes

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.cut.cuts import Cuts
    from pat_serve.families.family import Family

# v1/attention/backends/cpu_attn.py
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
GROUP_SIZES = (32, 64, 128)
# vLLM pads the vocabulary to this before it splits it.
_VOCAB_PADDING = 64
_CPU_VECTOR = 8
_TENSOR_CORE = 64
_CUTLASS = 16
_AMX_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a base and how its parameters depend on the width.

    Attributes:
        hidden_size: D, its width.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        head_dim: of one head.
        ffn: width of the feed-forward layer.
        vocab: rows of the embedding.
        hidden_multiple_of_heads: the config class of an export wants it.
        parameters_per_channel: parameters that each hidden channel carries.
        other_parameters: those that the width does not change.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn: int
    vocab: int
    hidden_multiple_of_heads: bool
    parameters_per_channel: int
    other_parameters: int

    def parameters(self, width: int) -> int:
        """Parameters of the model cut to a width."""
        return self.parameters_per_channel * width + self.other_parameters


def shape_of(checkpoint: Checkpoint, cuts: Cuts | None = None, *, unties_head: bool = False) -> Shape:
    """The shape of a base, or of one cut along every axis but its width.

    Args:
        checkpoint: the base.
        cuts: of a plan; none by default.
        unties_head: the export gets a head of its own where the base has none.
    """
    base, family = checkpoint.sizes, checkpoint.family
    cut = base if cuts is None else cuts.sizes(base)
    sizes, dropped = replace(cut, hidden=base.hidden), set(range(base.layers))
    dropped -= set(dropped if cuts is None else cuts.layers_kept(base.layers))
    export_as = family.class_of_export(base, cut, checkpoint.config)
    per_channel = other = 0
    for name in checkpoint.tensors:
        spec, layer, kind = family.match(name)
        if layer in dropped:
            continue
        size = math.prod(spec.shape(kind, sizes))
        if spec.has_hidden(kind):
            per_channel += size // checkpoint.hidden_size
        else:
            other += size
        if unties_head and name == f"{EMBEDDING}.weight":
            per_channel += size // checkpoint.hidden_size
    return Shape(
        hidden_size=checkpoint.hidden_size,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        vocab=sizes.vocab,
        hidden_multiple_of_heads=(export_as or family).hidden_multiple_of_heads,
        parameters_per_channel=per_channel,
        other_parameters=other,
    )


def shape_of_sizes(sizes: ModelSizes, family: Family) -> Shape:
    """The shape of a model of which only the sizes are known; biases and norms over heads are not counted.

    Args:
        sizes: of the model.
        family: of the model.
    """
    counted = ModelShape.of(sizes).parameters
    per_channel = ModelShape.of(replace(sizes, hidden=sizes.hidden + 1)).parameters - counted
    return Shape(
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn=sizes.ffn,
        vocab=sizes.vocab,
        hidden_multiple_of_heads=family.hidden_multiple_of_heads,
        parameters_per_channel=per_channel,
        other_parameters=counted - per_channel * sizes.hidden,
    )


def tensor_parallel_obstacles(shape: Shape, degree: int) -> list[str]:
    """Why vLLM cannot split a model over `degree` devices; empty when it can.

    The hidden width is no obstacle: every device holds all of it; what is split is heads,
    feed-forward channels and vocabulary.
    """
    found = []
    heads, kv_heads, padded = shape.num_attention_heads, shape.num_key_value_heads, _padded(shape.vocab)
    if heads % degree:
        found.append(f"{heads} heads are no multiple of {degree}")
    if kv_heads % degree and degree % kv_heads:
        found.append(f"{kv_heads} key-value heads neither divide by {degree} nor divide it")
    if shape.ffn % degree:
        found.append(f"intermediate_size {shape.ffn} is no multiple of {degree}")
    if padded % degree:
        found.append(f"the vocabulary, padded to {padded}, is no multiple of {degree}")
    return found


def tensor_parallel_degrees(shape: Shape) -> list[int]:
    """The degrees up to the number of heads at which vLLM can serve a model."""
    degrees = range(1, shape.num_attention_heads + 1)
    return [degree for degree in degrees if not tensor_parallel_obstacles(shape, degree)]


def group_sizes(shape: Shape, width: int) -> list[int]:
    """Group sizes of 4-bit formats (GPTQ, AWQ) that fit every linear of a model cut to a width."""
    inputs = (width, shape.num_attention_heads * shape.head_dim, shape.ffn)
    return [size for size in GROUP_SIZES if all(length % size == 0 for length in inputs)]


def slow_width(shape: Shape, width: int) -> str | None:
    """Say in a sentence why a legal width is slow and which widths are not; None for a fast width.

    Narrow bases, and those with an odd number of heads, have too few multiples of 64 to ask for one: there a smaller
    tile is asked for, or nothing but a legal width.
    """
    rule = shape.hidden_multiple_of_heads
    finest = fast_tile(shape.hidden_size, shape.num_attention_heads, hidden_multiple_of_heads=rule)
    tile = min(_TENSOR_CORE, finest or 1)
    if width % tile == 0:
        return None
    step = math.lcm(tile, legal_step(shape.num_attention_heads, hidden_multiple_of_heads=rule))
    near = widths_around(width, step, shape.hidden_size)
    return (
        f"hidden_size {width} is no multiple of {tile}, so matrix tiles of GPUs and AMX are partly empty; "
        f"the nearest multiples are {name_widths(near, shape.parameters)}"
    )


def cautions(shape: Shape, width: int, degrees: tuple[int, ...] = (1,), *, eight_bit: bool = False) -> list[str]:
    """Say in sentences which parts of a shape load but run slowly, or not everywhere.

    Args:
        shape: the base's.
        width: K.
        degrees: tensor-parallel degrees to think of.
        eight_bit: the linears are stored in 8 bits.
    """
    found = [text for text in (slow_width(shape, width),) if text]
    if shape.head_dim not in CPU_HEAD_DIMS:
        found.append(f"vLLM's CPU attention has no kernel for head_dim {shape.head_dim} (as in the base)")
    if shape.head_dim % 8 or shape.head_dim > 256:
        found.append(f"vLLM's FlashAttention has no kernel for head_dim {shape.head_dim} (as in the base)")
    for degree in degrees or (1,):
        at = f" at {degree}-fold tensor parallelism" if degree > 1 else ""
        if (shape.ffn // degree) % _CPU_VECTOR:
            found.append(f"vLLM's CPU kernels refuse {shape.ffn // degree} feed-forward channels{at}: no multiple of 8")
        if not eight_bit:
            continue
        for depth, rows in set(_linears(shape, width, degree)):
            if depth % _CUTLASS or rows % _CUTLASS:
                found.append(f"a linear of {rows} x {depth}{at} is not in 16s: no CUTLASS kernel, so slower on GPUs")
            elif depth % _AMX_DEPTH:
                found.append(f"a linear of {rows} x {depth}{at} is not 32s deep: no AMX kernel, so slower on CPUs")
    return found


def _linears(shape: Shape, width: int, degree: int) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of every linear on one device."""
    queries = shape.num_attention_heads * shape.head_dim // degree
    keys = max(1, shape.num_key_value_heads // degree) * shape.head_dim
    yield width, queries + 2 * keys
    yield queries, width
    yield width, 2 * (shape.ffn // degree)
    yield shape.ffn // degree, width


def _padded(vocab: int) -> int:
    return -(-vocab // _VOCAB_PADDING) * _VOCAB_PADDING
