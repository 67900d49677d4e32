"""LoRA on what stays of layers, FFN channels and key-value groups, chosen before the first step (`training/choices/`).

The stream keeps its width, so nothing follows its writers, a tied head stays tied, and no axis is turned. `pat` is this
and a narrower stream; `pat-train` takes this one by itself where a shape leaves the stream whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pat_serve.cut.axes import FFN, KV_GROUPS, LAYERS
from pat_serve.training.methods.lora import LoraOnly
from pat_serve.training.methods.pat.settings import PatSettings

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe


class Cut(LoraOnly):
    """Nothing beside LoRA on a model that is smaller from the first step."""

    name: ClassVar[str] = "cut"
    prunes: ClassVar[bool] = True
    axes: ClassVar[frozenset[str]] = frozenset({LAYERS, FFN, KV_GROUPS})
    unused: ClassVar[frozenset[str]] = frozenset({*PatSettings.model_fields, "narrow"})
    why_unused: ClassVar[str] = "leaves the stream as wide as it is"

    @classmethod
    def wants_batches(cls, recipe: TrainRecipe) -> bool:
        """Always, since choices and compensation read batches."""
        return True

    @classmethod
    def stays_wide(cls, recipe: TrainRecipe) -> str | None:
        """The stream does, since it is not cut."""
        return "its stream is not cut"
