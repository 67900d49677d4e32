"""Learning rates by group: which trained parameters a name stands for, and what `--lr-scale` makes of their rates.

LoRA+ (arXiv 2402.12354) is `lora_b=16`: B starts at zero and wants a larger rate than A. A parameter can be of several
groups, as the head's B is of `head` and `lora_b`: the factors multiply. The mask is of none; its rate is
`mask_learning_rate`, which no schedule moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pat_serve.families.architectures import HEAD

if TYPE_CHECKING:
    from torch import nn

LORA_A, LORA_B, HEAD_GROUP, HSM, NORMS, WEIGHTS = "lora_a", "lora_b", "head", "hsm", "norms", "weights"
GROUPS = (LORA_A, LORA_B, HEAD_GROUP, HSM, NORMS, WEIGHTS)
# The module of ATP's decision generator in a model.
GENERATOR = "atp_generator"
# An optimizer's group with this key has a rate that the method sets, not the recipe's schedule.
OWN_RATE = "own_rate"


def groups_of(parameter: str) -> frozenset[str]:
    """The groups of a trained parameter other than the mask.

    Args:
        parameter: its dotted name in the PEFT model, whatever wraps that.
    """
    parts = parameter.split(".")
    if "hsm" in parts:
        return frozenset({HSM})
    if GENERATOR in parts:
        return frozenset()  # its rate is the method's
    if "norm" in parts[-2]:
        return frozenset({NORMS})
    if parts[-1] != "weight":
        return frozenset()  # the mask's logits
    halves = {group for half, group in (("lora_A", LORA_A), ("lora_B", LORA_B)) if half in parts}
    return frozenset((halves or {WEIGHTS}) | ({HEAD_GROUP} if HEAD in parts else set()))


def rate_factor(parameter: str, scales: Mapping[str, float]) -> float:
    """The factor of a parameter's learning rate: the product over its groups."""
    return math.prod(scales[group] for group in sorted(groups_of(parameter)) if group in scales)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    scales: Mapping[str, float],
    own: Mapping[int, float],
) -> list[dict[str, Any]]:
    """The optimizer's groups: one for each rate and kind, in the model's order, which a resumed state is matched by.

    Norms' gains and HSMs' scales are not decayed: they are near one, not near zero. Nor is the mask: its losses keep
    its logits where they belong.

    Args:
        parameters: named as in the PEFT model; those that are not trained are left out.
        learning_rate: of the recipe.
        weight_decay: of the recipe.
        scales: its factors by group.
        own: rates that the method sets, by a parameter's id; apart even where they equal the recipe's, since the
            schedule is for that alone.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_own = id(parameter) in own
        rate = own[id(parameter)] if is_own else learning_rate * rate_factor(name, scales)
        stays = NORMS in groups_of(name) and not is_own
        # Where nothing decays the groups are as they always were, for the sake of older checkpoints.
        if weight_decay > 0:
            stays = stays or is_own or name.endswith("scale_D")
        groups.setdefault((rate, is_own, stays), []).append(parameter)
    return [
        {"params": group, "lr": rate, OWN_RATE: is_own} | ({"weight_decay": 0.0} if stays else {})
        for (rate, is_own, stays), group in groups.items()
    ]


def parse_scales(given: object) -> object:
    """`GROUP=FACTOR` texts as a mapping; what is none of them is left to be refused by the type.

    Raises:
        ValueError: a text is no GROUP=FACTOR, or a group comes twice.
    """
    if not isinstance(given, list | tuple):
        return given
    scales: dict[str, str] = {}
    for entry in given:
        group, equals, factor = str(entry).partition("=")
        if not equals or not group.strip():
            raise ValueError(f"GROUP=FACTOR, with a group of {', '.join(GROUPS)}")
        if group.strip() in scales:
            raise ValueError(f"one factor for {group.strip()}")
        scales[group.strip()] = factor.strip()
    return scales


def check_groups(scales: Mapping[str, float]) -> None:
    """Every group is known.

    Raises:
        ValueError: naming one that is not.
    """
    for group in scales:
        if group in ("mask", "pat_mask"):
            raise ValueError("no mask among the groups: its rate is mask_learning_rate")
        if group not in GROUPS:
            raise ValueError(f"groups of {', '.join(GROUPS)}, and {group!r} is none")


def untrained_group(
    scales: Mapping[str, float], *, lora: bool, head: bool, prunes: bool, norms: bool
) -> tuple[str, str] | None:
    """The first scaled group that a run trains nothing of, and what would train it; None if there is none."""
    halves = (lora, "Add --train lora, or leave the group out.")
    trains = {
        LORA_A: halves,
        LORA_B: halves,
        HEAD_GROUP: (head, "Add --lora-head, or leave the group out."),
        HSM: (prunes, "Choose a method that prunes, or leave the group out."),
        NORMS: (norms, "Add --train-norms, or leave the group out."),
        WEIGHTS: (not lora, "Add --train all or head+last3, or leave the group out."),
    }
    for group in scales:
        holds, fix = trains.get(group, (True, ""))
        if not holds:
            return group, fix
    return None
