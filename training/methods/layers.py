"""Layer pruning as reassessed (arXiv 2411.15558): drop the last layers, train the head and what is last then.

The authors freeze all but the head, the last norm and the last three layers, which are trained whole (`--train
head+last3`), and find no score better than depth itself. A tied head is the embedding, and is trained as both. Other
choices are `--choose layers=...`: `last` keeps the two layers that end the model, which pays where little is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pat_serve.cut.axes import LAYERS
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices.reverse import Reverse
from pat_serve.training.methods.cut import Cut


class Layers(Cut):
    """Fewer layers, and whole weights at the end of what is left."""

    name: ClassVar[str] = "layers"
    axes: ClassVar[frozenset[str]] = frozenset({LAYERS})
    cut_by_default: ClassVar[frozenset[str]] = axes
    choices: ClassVar[Mapping[str, str]] = {LAYERS: Reverse.name}
    # The published method makes up for nothing before the first step.
    defaults: ClassVar[Mapping[str, Any]] = {"compensate": False, "train": "head+last3", "train_norms": True}

    @classmethod
    def default_shape(cls, sizes: ModelSizes) -> dict[str, int]:
        """Three quarters of the layers."""
        dropped = round(sizes.layers / 4)
        return {LAYERS: sizes.layers - dropped} if dropped else {}
