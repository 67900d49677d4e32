"""Shapes as users ask for them: `hidden=3840,ffn=9472,layers=28,kv_groups=28`, any of these axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pat_serve.cut.axes import AXES, FFN, HIDDEN, KV_GROUPS
from pat_serve.errors import IllegalShape
from pat_serve.families.family import Family
from pat_serve.shapes.geometry import count_parameters
from pat_serve.shapes.sizes import ModelSizes

_EXAMPLE = "Try --shape layers=24,ffn=1280."
# vLLM's CPU kernels for RMSNorm and SiLU refuse sizes that do not fill their vectors.
_VECTOR = 8


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
        IllegalShape: a count is above the base's or below 1, nothing changes, or no class or kernel takes the sizes.
    """
    for name, count in counts.items():
        if name not in AXES:
            raise _illegal(f"axes among {', '.join(AXES)}", f"{name!r:.80}")
        length = AXES[name].length(base)
        if not 1 <= count <= length:
            fix = f"Give {name} a count below {length}, or leave {name} out."
            raise _illegal(f"{name} between 1 and the base's {length}", f"{count}", fix)
    cut = base.with_counts(counts)
    if cut == base:
        whole = ", ".join(f"{name}={axis.length(base)}" for name, axis in AXES.items())
        fix = f"The base has {whole}; give a smaller count along one axis or more."
        raise _illegal("a count below the base's", "a shape that changes nothing", fix)
    if obstacles := _obstacles(base, cut, family, config):
        near = [
            f"{shape_text(shape)} ({count_parameters(base.with_counts(shape).parameters)} parameters)"
            for shape in nearest_legal(counts, base, family, config)
        ]
        fix = f"Nearest legal shapes: {', '.join(near)}." if near else "Leave hidden and kv_groups whole."
        raise _illegal("sizes that a stock class and its kernels take", "; ".join(obstacles), fix)
    return cut


def _obstacles(base: ModelSizes, cut: ModelSizes, family: Family, config: Mapping[str, Any] | None) -> list[str]:
    """Why no stock class takes these sizes, or vLLM's kernels on a CPU do not; empty if all do."""
    uneven = [
        f"vLLM's CPU kernels want {name} as a multiple of {_VECTOR}, not {count}"
        for name, count, whole in ((HIDDEN, cut.hidden, base.hidden), (FFN, cut.ffn, base.ffn))
        if count != whole and count % _VECTOR
    ]
    return family.obstacles(base, cut, config) + uneven


def shape_text(counts: Mapping[str, int]) -> str:
    """Counts as `--shape` takes them."""
    return ",".join(f"{axis}={count}" for axis, count in counts.items())


def nearest_legal(
    counts: Mapping[str, int], base: ModelSizes, family: Family, config: Mapping[str, Any] | None = None
) -> list[dict[str, int]]:
    """Legal shapes with one count of an illegal one changed, the next below and above; FFN channels first.

    Args:
        counts: of the illegal shape, each one possible by itself.
        base: sizes of the base.
        family: of the base.
        config: of the base; a plain one by default.
    """

    def is_legal(shape: Mapping[str, int]) -> bool:
        cut = base.with_counts(shape)
        return cut != base and not _obstacles(base, cut, family, config)

    def around(shape: Mapping[str, int], axis: str) -> Iterator[dict[str, int]]:
        length = AXES[axis].length(base)
        asked = shape.get(axis, length)
        for others in (range(asked - 1, 0, -1), range(asked + 1, length + 1)):
            shapes = ({**shape, axis: count} for count in others)
            yield from (one for one in (next(filter(is_legal, shapes), None),) if one)

    if counts.get(FFN, 0) % _VECTOR and counts[FFN] != base.ffn:
        below = counts[FFN] // _VECTOR * _VECTOR
        starts = [{**counts, FFN: count} for count in (below, below + _VECTOR) if 0 < count <= base.ffn]
    else:
        starts = [dict(counts)]
    found: list[dict[str, int]] = []
    for start in starts:
        found += [start] if is_legal(start) else [one for axis in (HIDDEN, KV_GROUPS) for one in around(start, axis)]
    return found


def _illegal(expected: str, found: str, fix: str = _EXAMPLE) -> IllegalShape:
    return IllegalShape("--shape", expected=expected, found=found, fix=fix)
