"""Shapes as users ask for them: `hidden=3840,ffn=9472,layers=28,kv_groups=28`, any of these axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat_serve.axes import AXES
from pat_serve.errors import IllegalShape
from pat_serve.family import Family
from pat_serve.sizes import ModelSizes

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
        raise _illegal("sizes that a stock class takes", "; ".join(obstacles), "Choose another width or group count.")
    return cut


def _illegal(expected: str, found: str, fix: str = _EXAMPLE) -> IllegalShape:
    return IllegalShape("--shape", expected=expected, found=found, fix=fix)
