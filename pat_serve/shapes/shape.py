"""Shapes as users ask for them: `hidden=3840,ffn=9472,layers=28,kv_groups=28`, any of these axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.cut.axes import AXES, HIDDEN, KV_GROUPS
from pat_serve.errors import IllegalShape
from pat_serve.families.family import Family
from pat_serve.shapes.geometry import count_parameters
from pat_serve.shapes.sizes import ModelSizes

_EXAMPLE = "Try --shape layers=24,ffn=1280."


def parse_shape(text: str) -> dict[str, int]:
    """The counts to keep by axis.

    Args:
        text: what follows `--shape`.

    Raises:
        IllegalShape: it names no axis, an unknown one or one twice, or a count is no positive integer.
    """
    counts: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (side.strip() for side in part.partition("="))
        if name not in AXES:
            raise _illegal(f"axes among {', '.join(AXES)}", f"{part!r:.80}")
        if name in counts:
            raise _illegal("every axis once", f"{name} twice")
        if not (number.isascii() and number.isdecimal()) or int(number) < 1:
            raise _illegal(f"{name} as a count of 1 or more", f"{number!r:.80}")
        counts[name] = int(number)
    if not counts:
        raise _illegal(f"counts of {', '.join(AXES)}", "none")
    return counts


def check_shape(
    counts: Mapping[str, int], base: ModelSizes, family: Family, config: Mapping[str, Any] | None = None
) -> ModelSizes:
    """The sizes of a base cut to these counts.

    Args:
        counts: to keep, by axis.
        base: sizes of the base.
        family: of the base.
        config: of the base; a plain one by default.

    Raises:
        IllegalShape: a count is above the base's or below 1, nothing changes, or no stock class takes the sizes.
    """
    for name, count in counts.items():
        if name not in AXES:
            raise _illegal(f"axes among {', '.join(AXES)}", f"{name!r:.80}")
        length = AXES[name].length(base)
        if not 1 <= count <= length:
            raise _illegal(f"{name} between 1 and the base's {length}", f"{count}")
    cut = base.with_counts(counts)
    if cut == base:
        raise _illegal("a count below the base's", "a shape that changes nothing")
    if obstacles := family.obstacles(base, cut, config):
        near = [
            f"{shape_text(shape)} ({count_parameters(base.with_counts(shape).parameters)} parameters)"
            for shape in nearest_legal(counts, base, family, config)
        ]
        fix = f"Nearest legal shapes: {', '.join(near)}." if near else "Leave hidden and kv_groups whole."
        raise _illegal("sizes that a stock class takes", "; ".join(obstacles), fix)
    return cut


def shape_text(counts: Mapping[str, int]) -> str:
    """Counts as `--shape` takes them."""
    return ",".join(f"{axis}={count}" for axis, count in counts.items())


def nearest_legal(
    counts: Mapping[str, int], base: ModelSizes, family: Family, config: Mapping[str, Any] | None = None
) -> list[dict[str, int]]:
    """Shapes that a stock class takes, with one count of an illegal shape changed: the next below and above.

    Width and groups alone decide whether a class takes a shape.

    Args:
        counts: of the illegal shape, each one possible by itself.
        base: sizes of the base.
        family: of the base.
        config: of the base; a plain one by default.
    """
    found = []
    for axis in (HIDDEN, KV_GROUPS):
        length = AXES[axis].length(base)
        asked = counts.get(axis, length)
        for others in (range(asked - 1, 0, -1), range(asked + 1, length + 1)):
            shapes = ({**counts, axis: count} for count in others)
            sized = ((shape, base.with_counts(shape)) for shape in shapes)
            fine = (one for one, cut in sized if cut != base and not family.obstacles(base, cut, config))
            found += [one for one in (next(fine, None),) if one]
    return found


def _illegal(expected: str, found: str, fix: str = _EXAMPLE) -> IllegalShape:
    return IllegalShape("--shape", expected=expected, found=found, fix=fix)
