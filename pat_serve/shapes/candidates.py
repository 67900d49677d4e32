"""Counts by axis that cut a share of all parameters, or that make a model fast enough. Pure arithmetic.

A search goes over the counts that are fast (`axis_grid`) and asks a stock class whether it takes them together. A mix
that meets a share is the most even one: every axis gives about the same share of itself. Where no fast counts come
near enough, the search goes over all counts that load.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from pat_serve.cut.axes import AXES, FFN, HIDDEN, KV_GROUPS, LAYERS
from pat_serve.errors import IllegalRatio
from pat_serve.families.family import Family
from pat_serve.shapes.geometry import MAX_RATIO, fast_tile, legal_step, legal_widths, width_step
from pat_serve.shapes.sizes import ModelSizes

# A table of candidates shows each axis alone, and mixes of them.
MIXES: tuple[tuple[str, ...], ...] = (
    (HIDDEN,),
    (LAYERS,),
    (FFN,),
    (KV_GROUPS,),
    (LAYERS, FFN),
    (FFN, KV_GROUPS),
    (LAYERS, FFN, KV_GROUPS),
    (HIDDEN, LAYERS, FFN),
    (HIDDEN, LAYERS, FFN, KV_GROUPS),
)

# A mix that comes so near to the share that was asked for has met it.
TOLERANCE = 0.01
# Tiles of 64 are filled by tensor cores and AMX; vectors of 8 are the least that vLLM's CPU kernels take.
_TILE, _VECTOR = 64, 8
# FFN channels that int8 takes, too.
_INT8 = 16
# How many of the nearest counts are tried where a class refuses the nearest.
_TRIES = 4
# Grids of `axis_grid`, from the fast counts to all that load.
_FINENESSES = 3


def axis_grid(axis: str, base: ModelSizes, family: Family, fineness: int = 0) -> list[int]:
    """Counts of an axis below the base's, ascending; a cut of 60 % is the largest.

    Layers and KV groups go one by one. At fineness 0 all counts are fast: FFN channels go in tiles of 64 (in smaller
    ones where the base is narrow), and the stream in the steps of `width_step`. Fineness 1 has channels by 16 and every
    width that the base's own class takes, fineness 2 all that load: multiples of 8. Empty where the base has too few.
    """
    length, rule = AXES[axis].length(base), family.hidden_multiple_of_heads
    steps = (1, 1, 1)
    if axis == FFN:
        steps = (min(_TILE, fast_tile(length, 1, hidden_multiple_of_heads=False) or _VECTOR), _INT8, _VECTOR)
    elif axis == HIDDEN:
        steps = (
            width_step(length, base.heads, hidden_multiple_of_heads=rule),
            legal_step(base.heads, hidden_multiple_of_heads=rule),
            _VECTOR,
        )
    return legal_widths(min(steps[: fineness + 1]), length)


def exported_sizes(base: ModelSizes, counts: Mapping[str, int], *, unties: bool = False) -> ModelSizes:
    """Sizes of an export with these counts.

    Args:
        base: sizes of the base.
        counts: to keep, by axis.
        unties: a cut of the stream gives a tied base a head of its own.
    """
    sizes = base.with_counts(counts)
    return replace(sizes, tied=base.tied and not (unties and HIDDEN in counts))


def share_cut(base: ModelSizes, exported: ModelSizes) -> float:
    """The share of all of a base's parameters that an export lacks; below 0 where it has more."""
    return 1 - exported.parameters / base.parameters


def counts_for_ratio(
    base: ModelSizes,
    family: Family,
    ratio: float,
    axes: Sequence[str],
    *,
    config: Mapping[str, Any] | None = None,
    unties: bool = False,
    takes: Callable[[ModelSizes], bool] = lambda _: True,
) -> dict[str, int] | None:
    """Counts along some axes that cut a share of all parameters.

    The most even mix of fast counts within 1 % of the share is taken. Where none is within, counts that load are
    tried (`axis_grid`), and where none of them is either, the nearest to the share is taken. `share_cut` tells which.

    Args:
        base: sizes of the base.
        family: of the base.
        ratio: share of all parameters to cut, in (0, 0.6].
        axes: to cut along, every one of them.
        config: of the base; a plain one by default.
        unties: a cut of the stream gives a tied base a head of its own.
        takes: further wishes of an export's sizes, such as a tensor-parallel degree.

    Returns:
        counts by axis; None where no stock class takes any of them.

    Raises:
        IllegalRatio: the share is outside (0, 0.6].
    """
    check_ratio(ratio)
    wanted = (1 - ratio) * base.parameters
    best: tuple[tuple[bool, float, int], dict[str, int]] | None = None
    for fineness in range(_FINENESSES):
        for others, finest, grid in _mixes(axes, base, family, fineness):

            def sized(count: int, others: Mapping[str, int] = others, finest: str = finest) -> ModelSizes:
                return exported_sizes(base, {**others, finest: count}, unties=unties)

            at = bisect_left(grid, wanted, key=lambda count: sized(count).parameters)
            for place in _around(at, len(grid)):
                sizes = sized(grid[place])
                counts = {**others, finest: grid[place]}
                off = abs(share_cut(base, sizes) - ratio)
                missed = off > TOLERANCE
                # The larger of two equally near sizes keeps more, and cuts less than the user allowed.
                rank = (missed, off if missed else _unevenness(counts, base) + off, -sizes.parameters)
                if (best is None or rank < best[0]) and _legal(base, sizes, family, config) and takes(sizes):
                    best = rank, counts
        if best is not None and not best[0][0]:
            break
    return _in_order(best[1]) if best else None


def counts_for_speedup(
    base: ModelSizes,
    family: Family,
    wanted: float,
    axes: Sequence[str],
    speedup: Callable[[ModelSizes], float],
    *,
    config: Mapping[str, Any] | None = None,
    unties: bool = False,
    takes: Callable[[ModelSizes], bool] = lambda _: True,
) -> dict[str, int] | None:
    """Counts along some axes that are fast enough with the fewest parameters cut.

    Counts with fast kernels come first (`axis_grid`); finer ones are looked at only where none of those will do.

    Args:
        base: sizes of the base.
        family: of the base.
        wanted: the speed-up to reach, above 1.
        axes: to cut along, every one of them.
        speedup: of an export's sizes over the base; it rises with every cut.
        config: of the base; a plain one by default.
        unties: a cut of the stream gives a tied base a head of its own.
        takes: further wishes of an export's sizes.

    Returns:
        counts by axis; None where no cut that a stock class takes is fast enough.
    """
    for fineness in range(_FINENESSES):
        best: tuple[tuple[int, float], dict[str, int]] | None = None
        for others, finest, grid in _mixes(axes, base, family, fineness):

            def sized(count: int, others: Mapping[str, int] = others, finest: str = finest) -> ModelSizes:
                return exported_sizes(base, {**others, finest: count}, unties=unties)

            if best and sized(grid[-1]).parameters < -best[0][0]:
                continue
            fast = bisect_right(grid, -wanted, key=lambda count: -speedup(sized(count)))
            for count in reversed(grid[max(0, fast - _TRIES) : fast]):
                sizes, counts = sized(count), {**others, finest: count}
                if _legal(base, sizes, family, config) and takes(sizes):
                    rank = (-sizes.parameters, _unevenness(counts, base))
                    if best is None or rank < best[0]:
                        best = rank, counts
                    break
        if best:
            return _in_order(best[1])
    return None


def check_ratio(ratio: float) -> None:
    """Refuse a share that no cut has.

    Raises:
        IllegalRatio: it is outside (0, 0.6].
    """
    if not 0 < ratio <= MAX_RATIO:
        raise IllegalRatio(
            "--ratio",
            expected=f"a share of all parameters to cut, in (0, {MAX_RATIO}]",
            found=f"{ratio}",
            fix="Try --ratio 0.25.",
        )


def _mixes(
    axes: Sequence[str], base: ModelSizes, family: Family, fineness: int
) -> Iterator[tuple[dict[str, int], str, list[int]]]:
    """Every mix of all axes but the finest, with that axis and its counts."""
    grids = {axis: axis_grid(axis, base, family, fineness) for axis in axes}
    if not grids or not all(grids.values()):
        return
    finest = max(grids, key=lambda axis: len(grids[axis]))
    coarse = [axis for axis in grids if axis != finest]
    for counts in product(*(grids[axis] for axis in coarse)):
        yield dict(zip(coarse, counts, strict=True)), finest, grids[finest]


def _around(at: int, length: int) -> range:
    """Places of a grid around the border between two of them."""
    return range(max(0, at - _TRIES), min(length, at + _TRIES))


def _legal(base: ModelSizes, sizes: ModelSizes, family: Family, config: Mapping[str, Any] | None) -> bool:
    return not family.obstacles(base, sizes, config)


def _unevenness(counts: Mapping[str, int], base: ModelSizes) -> float:
    """Standard deviation of the shares that the axes give."""
    shares = [1 - count / AXES[axis].length(base) for axis, count in counts.items()]
    mean = sum(shares) / len(shares)
    return math.sqrt(sum((share - mean) ** 2 for share in shares) / len(shares))


def _in_order(counts: Mapping[str, int]) -> dict[str, int]:
    return {axis: counts[axis] for axis in AXES if axis in counts}
