"""The axes that a cut can follow, and which of them each dimension of a tensor runs along. No torch: tables read it.

A stock checkpoint can lose channels of the residual stream (`hidden`), layers, feed-forward channels (`ffn`) and
key-value heads with their query heads (`kv_groups`). The counts are the same in all layers; which channels or groups
stay may differ from layer to layer. Layers are no dimension of a tensor: some are dropped, and the rest is renumbered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pat_serve.shapes.sizes import ModelSizes

HIDDEN = "hidden"
LAYERS = "layers"
FFN = "ffn"
KV_GROUPS = "kv_groups"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis that a cut can follow.

    Attributes:
        name: as plans and `--shape` name it.
        per_layer: every layer has a choice of its own, on a line of its own in a plan (`ffn.7`).
        length: its number of indices in a model.
        settings: what config.json says of a model that keeps so many of them.
        sliced: lists in config.json that have one entry for each of its indices.
        counted: settings that say for how many of its first indices something holds.
    """

    name: str
    per_layer: bool
    length: Callable[[ModelSizes], int]
    settings: Callable[[ModelSizes, int], dict[str, Any]]
    sliced: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            name=HIDDEN,
            per_layer=False,
            length=lambda sizes: sizes.hidden,
            settings=lambda _, count: {"hidden_size": count},
        ),
        Axis(
            name=LAYERS,
            per_layer=False,
            length=lambda sizes: sizes.layers,
            settings=lambda _, count: {"num_hidden_layers": count},
            sliced=("layer_types",),
            counted=("max_window_layers",),
        ),
        Axis(
            name=FFN,
            per_layer=True,
            length=lambda sizes: sizes.ffn,
            settings=lambda _, count: {"intermediate_size": count},
        ),
        Axis(
            name=KV_GROUPS,
            per_layer=True,
            length=lambda sizes: sizes.kv_heads,
            settings=lambda sizes, count: {
                "num_key_value_heads": count,
                "num_attention_heads": count * sizes.heads_per_group,
            },
        ),
    )
}

# Lengths that no plan cuts.
_WHOLE: dict[str, Callable[[ModelSizes], int]] = {
    "vocab": lambda sizes: sizes.vocab,
    "head": lambda sizes: sizes.head_dim,
}


@dataclass(frozen=True)
class Piece:
    """A run of a dimension that goes along one axis, index by index.

    Attributes:
        axis: a name of `AXES`, or `vocab` or `head`, which no plan cuts.
        block: entries of each index.
    """

    axis: str
    block: Callable[[ModelSizes], int] = lambda _: 1

    def length(self, sizes: ModelSizes) -> int:
        """Entries of the whole piece in a model of these sizes."""
        axis = AXES.get(self.axis)
        return (axis.length if axis else _WHOLE[self.axis])(sizes) * self.block(sizes)


# A dimension of a tensor is a row of pieces. A fused projection has more than one.
Dim = tuple[Piece, ...]

HIDDEN_DIM: Dim = (Piece(HIDDEN),)
VOCAB_DIM: Dim = (Piece("vocab"),)
HEAD_DIM: Dim = (Piece("head"),)
FFN_DIM: Dim = (Piece(FFN),)
# The query heads of a group lie one behind the other, and so do the groups.
Q_DIM: Dim = (Piece(KV_GROUPS, lambda sizes: sizes.heads_per_group * sizes.head_dim),)
KV_DIM: Dim = (Piece(KV_GROUPS, lambda sizes: sizes.head_dim),)
QKV_DIM: Dim = Q_DIM + KV_DIM + KV_DIM
GATE_UP_DIM: Dim = FFN_DIM + FFN_DIM


def dim_length(dim: Dim, sizes: ModelSizes) -> int:
    """Entries of a dimension in a model of these sizes."""
    return sum(piece.length(sizes) for piece in dim)
