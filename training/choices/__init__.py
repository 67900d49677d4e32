"""Which indices of an axis stay, by axis and name. A NEW CHOICE is one file beside this one and one line in CHOICES.

The hidden axis is not among them: which of its channels stay is the method's (`pat`).
"""

from __future__ import annotations

from collections.abc import Mapping

from pat_serve.cut.axes import FFN, KV_GROUPS, LAYERS
from pat_serve.training.choices.base import Choice, InnerChoice, Inputs, LayerChoice, ModelChoice
from pat_serve.training.choices.baselines import Magnitude, Random
from pat_serve.training.choices.energy import Energy
from pat_serve.training.choices.greedy import Greedy
from pat_serve.training.choices.influence import Influence
from pat_serve.training.choices.last import Last
from pat_serve.training.choices.leverage import Leverage
from pat_serve.training.choices.obs import Obs
from pat_serve.training.choices.perplexity import Perplexity
from pat_serve.training.choices.refit import Refit
from pat_serve.training.choices.reverse import Reverse
from pat_serve.training.choices.taylor import Taylor, TaylorMixed, TaylorSecond, TaylorVector

# These choose of two axes alike.
_OF_BOTH: tuple[type[ModelChoice], ...] = (Taylor, TaylorSecond, TaylorMixed, TaylorVector, Magnitude, Random)

# The first of an axis is its default.
CHOICES: tuple[Choice, ...] = (
    Influence(), Last(), Reverse(), Perplexity(), Greedy(), Obs(), Energy(), Leverage(), Refit(),
    *(choice(axis) for axis in (FFN, KV_GROUPS) for choice in _OF_BOTH),
)  # fmt: skip

CHOICE_NAMES: dict[str, list[str]] = {
    axis: [choice.name for choice in CHOICES if choice.axis == axis] for axis in (LAYERS, FFN, KV_GROUPS)
}

__all__ = ["CHOICES", "CHOICE_NAMES", "Choice", "InnerChoice", "Inputs", "LayerChoice", "ModelChoice", "choice_of"]


def choice_of(axis: str, names: Mapping[str, str]) -> Choice:
    """The choice that decides over an axis.

    Args:
        axis: layers, ffn or kv_groups.
        names: of choices that there are, by axis, where it is not the default.
    """
    name = names.get(axis, CHOICE_NAMES[axis][0])
    [found] = [choice for choice in CHOICES if choice.axis == axis and choice.name == name]
    return found
