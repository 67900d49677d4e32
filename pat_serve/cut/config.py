"""config.json of a cut model, as far as the cuts decide it: sizes, per-layer lists and the class. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.cut.axes import Axis
from pat_serve.cut.cuts import AxisCut, Cuts, parse_line
from pat_serve.errors import IllegalShape
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes


def cut_config(config: Mapping[str, Any], family: Family, cuts: Cuts) -> dict[str, Any]:
    """The base's config.json with the sizes, lists and class of the cut model.

    `rms_norm_eps`, which follows the width, and the tie are left as they are: they depend on more than the cuts.

    Args:
        config: the base's, parsed.
        family: the base's.
        cuts: of a plan.

    Raises:
        BrokenPlan: the cuts do not fit the base.
        IllegalShape: no stock class takes the sizes.
    """
    base = ModelSizes.of(config, family)
    cut = cuts.sizes(base)
    if obstacles := family.obstacles(base, cut, config):
        raise IllegalShape(
            f"a {family.model_type} of {describe(cut)}",
            expected="sizes that a stock class takes",
            found="; ".join(obstacles),
            fix="Choose another width, or another number of key-value groups.",
        )
    found = dict(config)
    if other := family.class_of_export(base, cut, config):
        found = {name: value for name, value in found.items() if name not in other.dropped}
        found |= {name: value for name, value in other.filled.items() if name not in found}
        found |= {"model_type": other.model_type, **other.settings}
    found["architectures"] = [other.architecture if other else family.architecture]
    # Left out, the class would derive both from the width.
    found["head_dim"] = base.head_dim
    found["num_key_value_heads"] = base.kv_heads
    for line, axis_cut in cuts.items():
        axis, _ = parse_line(line)
        found |= axis.settings(base, len(axis_cut.kept))
        _follow(found, axis, axis_cut, family)
    return found


def describe(sizes: ModelSizes) -> str:
    """ "hidden 3840, 28 layers, FFN 9472, 28 heads in 28 groups" """
    return (
        f"hidden {sizes.hidden}, {sizes.layers} layers, FFN {sizes.ffn}, {sizes.heads} heads in {sizes.kv_heads} groups"
    )


def _follow(config: dict[str, Any], axis: Axis, cut: AxisCut, family: Family) -> None:
    """Fit lists with an entry for each index, and counts of first indices, to the indices that stay; in place."""
    for name in axis.sliced:
        if isinstance(config.get(name), list):
            config[name] = [config[name][i] for i in cut.kept.tolist()]
    for name in axis.counted:
        value = config.get(name, family.defaults.get(name))
        if value is not None and not cut.is_identity:
            config[name] = int((cut.kept < value).sum())
