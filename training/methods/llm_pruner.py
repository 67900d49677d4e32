"""LLM-Pruner (arXiv 2305.11627): FFN channels and key-value groups by a Taylor series of the loss, and LoRA to recover.

`cut` with other choices (`training/choices/taylor.py`), and without the refit that the authors did not have;
`--compensate` adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pat_serve.cut.axes import FFN, KV_GROUPS
from pat_serve.errors import UsageError
from pat_serve.training.choices import choice_of
from pat_serve.training.choices.taylor import Taylor
from pat_serve.training.methods.cut import Cut

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.training.config import TrainRecipe


class LlmPruner(Cut):
    """Every layer gives as many groups, so that the result is a stock model."""

    name: ClassVar[str] = "llm-pruner"
    axes: ClassVar[frozenset[str]] = frozenset({FFN, KV_GROUPS})
    choices: ClassVar[Mapping[str, str]] = {FFN: Taylor.name, KV_GROUPS: Taylor.name}
    defaults: ClassVar[Mapping[str, Any]] = {"compensate": False}

    @classmethod
    def check_base(cls, recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
        """Take no other choice than a Taylor series."""
        for axis, name in recipe.choose.items():
            if not isinstance(choice_of(axis, {axis: name}), Taylor):
                raise UsageError(
                    f"--choose {axis}={name}",
                    expected=f"a Taylor score, since --method {cls.name} is that: taylor, taylor-second and so on",
                    found=name,
                    fix="Leave it out, or choose --method cut, which takes any.",
                )
