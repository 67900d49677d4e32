"""Which shapes a table shows: each axis alone and mixes, for a share of all parameters or for a speed-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.errors import UsageError
from pat_serve.server.analysis.shape_figures import Setting, ShapeFigures
from pat_serve.shapes.candidates import (
    MIXES,
    TOLERANCE,
    axis_grid,
    counts_for_ratio,
    counts_for_speedup,
    exported_sizes,
)
from pat_serve.shapes.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Found:
    """Shapes for a table.

    Attributes:
        shapes: their figures.
        picked: place of the one that was chosen; None where nothing was to be chosen.
        remarks: what was asked for and is not there, in sentences.
    """

    shapes: list[ShapeFigures]
    picked: int | None
    remarks: list[str]


def for_ratio(setting: Setting, ratio: float) -> Found:
    """The most even shape of each mix that cuts a share of all parameters.

    Where no shape serves the tensor-parallel degrees, one is shown that does not, and says so.

    Args:
        setting: the base, and what figures are wanted.
        ratio: share of all parameters to cut, in (0, 0.6].

    Raises:
        IllegalRatio: it is not in there.
    """
    shapes, remarks = [], []
    for axes, unties in _mixes(setting):
        found = None
        for degrees in dict.fromkeys((tuple(setting.degrees), ())):
            tried = counts_for_ratio(
                setting.base,
                setting.family,
                ratio,
                axes,
                config=setting.config,
                unties=unties,
                takes=replace(setting, degrees=degrees).splits,
            )
            met = tried is not None and _off(setting, tried, unties, ratio) <= TOLERANCE
            if met or found is None:
                found = tried
            if met:
                break
        name = " + ".join(axes) + (" untied" if unties else "")
        if found is None:
            remarks.append(f"{name}: too few counts to choose from that a stock class takes")
            continue
        shapes.append(setting.figures(found, unties=unties))
        if _off(setting, found, unties, ratio) > TOLERANCE:
            remarks.append(
                f"{name}: {shapes[-1].share:.1%} is the nearest to {ratio:.1%} (with at most 60 % of an axis cut)"
            )
    return Found(shapes=shapes, picked=None, remarks=remarks)


def for_speedup(setting: Setting, wanted: float) -> Found:
    """The smallest cut along each mix that is so fast under every load, and the smallest of all.

    Args:
        setting: the base, its loads, and the costs that the speed is counted from.
        wanted: speed-up of decode, above 1.

    Raises:
        UsageError: it is not above 1, or no cut is so fast.
    """
    if not 1 < wanted < float("inf"):
        raise UsageError("--speedup", expected="a number above 1", found=f"{wanted}", fix="Try --speedup 1.33.")

    def slowest(sizes: ModelSizes) -> float:
        return min(setting.decode_speedup(sizes, load) for load in setting.loads)

    def smallest(axes: tuple[str, ...], unties: bool = False) -> dict[str, int] | None:
        return counts_for_speedup(
            setting.base,
            setting.family,
            wanted,
            axes,
            slowest,
            config=setting.config,
            unties=unties,
            takes=setting.splits,
        )

    # A cut of the stream that unties takes few parameters away because it adds a head: it is shown, and not chosen.
    tied = {axes: smallest(axes) for size in range(1, 5) for axes in combinations(AXES, size)}
    kept = {axes: _parameters(setting, counts) for axes, counts in tied.items() if counts}
    if not kept:
        reached = max(slowest(exported_sizes(setting.base, counts)) for counts in _deepest(setting))
        raise UsageError(
            f"--speedup {wanted}",
            expected="a speed-up that a cut of at most 60 % of every axis gives",
            found=f"{reached:.3f} at most, under the least favourable load",
            fix="Ask for less, or for a smaller batch and context.",
        )
    best = max(kept, key=lambda axes: kept[axes])
    shown = [(axes, unties) for axes, unties in _mixes(setting) if axes != best or unties]
    shapes, remarks = [setting.figures(tied[best] or {})], []
    for axes, unties in shown:
        counts = smallest(axes, True) if unties else tied[axes]
        if counts is None:
            name = " + ".join(axes) + (" untied" if unties else "")
            remarks.append(f"{name}: no cut of at most 60 % is so fast under every load")
        else:
            shapes.append(setting.figures(counts, unties=unties))
    return Found(shapes=shapes, picked=0, remarks=remarks)


def _mixes(setting: Setting) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Axes, and whether a tied base gets a head of its own: for the stream alone both are shown."""
    for axes in MIXES:
        yield axes, False
        if setting.base.tied and axes == (HIDDEN,):
            yield axes, True


def _off(setting: Setting, counts: Mapping[str, int], unties: bool, ratio: float) -> float:
    return abs(setting.figures(counts, unties=unties).share - ratio)


def _parameters(setting: Setting, counts: Mapping[str, int]) -> int:
    return exported_sizes(setting.base, counts).parameters


def _deepest(setting: Setting) -> Iterator[dict[str, int]]:
    """The deepest cut along each axis alone, and along all."""
    least = {axis: grid[0] for axis in AXES if (grid := axis_grid(axis, setting.base, setting.family))}
    yield least
    for axis, count in least.items():
        yield {axis: count}
