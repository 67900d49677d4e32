"""Parameters of a base cut to other sizes, counted from the names of its tensors: biases and norms over heads too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pat_serve.families.architectures import HEAD
from pat_serve.shapes.sizes import ModelSizes

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint


def parameters_at(checkpoint: Checkpoint, sizes: ModelSizes, *, own_head: bool = False) -> int:
    """Parameters of a base cut to these sizes. Every layer of a model has the same, so it does not matter which go.

    Args:
        checkpoint: the base; its headers alone are read.
        sizes: of the cut model.
        own_head: a tied base gets a head of its own.
    """
    names = dict.fromkeys(checkpoint.tensors)
    if checkpoint.tied:
        names.pop(f"{HEAD}.weight", None)
        if own_head:
            names[f"{HEAD}.weight"] = None
    count = 0
    for name in names:
        spec, layer, kind = checkpoint.family.match(name)
        if layer is None or layer < sizes.layers:
            count += math.prod(spec.shape(kind, sizes))
    return count
