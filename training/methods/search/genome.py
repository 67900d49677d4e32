"""A candidate of a search: counts by axis, and which indices stay; how one is made, and how one is changed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pat_serve.cut.axes import AXES, FFN, KV_GROUPS, LAYERS
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices.base import largest

# A layer's channels are drawn again with noise of so many nats on the logarithm of their scores.
NOISES = (0.1, 0.3, 1.0)
MOST_CHANGES = 3


@dataclass(frozen=True)
class Genome:
    """Counts by axis (none: whole), and the kept indices by line, ascending; inner axes have a line for every layer."""

    counts: tuple[tuple[str, int], ...]
    kept: tuple[tuple[str, tuple[int, ...]], ...]

    def of(self, line: str) -> tuple[int, ...] | None:
        """The kept indices of a line; None where its axis is whole."""
        return dict(self.kept).get(line)

    def tensors(self) -> dict[str, Tensor]:
        """int64 indices by line."""
        return {line: torch.tensor(indices) for line, indices in self.kept}


class Breeder:
    """Makes candidates from scores of indices.

    Args:
        sizes: of the base.
        scores: a number above zero for each index, by line (`layers`, `ffn.7`); the largest stay.
        shapes: counts by axis that a candidate may have.
        seed: of all draws.
    """

    def __init__(
        self, sizes: ModelSizes, scores: Mapping[str, Tensor], shapes: Sequence[Mapping[str, int]], seed: int
    ) -> None:
        self.sizes = sizes
        # On the CPU, whatever the model is on.
        self.scores = {line: score.double().cpu() for line, score in scores.items()}
        self.shapes = [{axis: n for axis, n in shape.items() if n < AXES[axis].length(sizes)} for shape in shapes]
        self.draws = random.Random(seed)

    def first(self, counts: Mapping[str, int]) -> Genome:
        """The candidate of a shape that the scores choose."""
        counts = {axis: n for axis, n in counts.items() if n < AXES[axis].length(self.sizes)}
        kept: dict[str, tuple[int, ...]] = {}
        for line, score in self.scores.items():
            axis = line.partition(".")[0]
            if axis in counts:
                kept[line] = tuple(largest(score, counts[axis]).tolist())
        return _genome(counts, kept)

    def child(self, parent: Genome) -> Genome:
        """One to three changes of a parent: another shape, a layer for another, or other indices in a layer."""
        child = parent
        for _ in range(self.draws.randint(1, MOST_CHANGES)):
            counts = dict(child.counts)
            ways = [axis for axis in (LAYERS, FFN, KV_GROUPS) if axis in counts]
            if len(self.shapes) > 1:
                ways.append("shape")
            way = self.draws.choice(ways)
            child = self._reshaped(child) if way == "shape" else self._changed(child, way)
        return child

    def _reshaped(self, parent: Genome) -> Genome:
        """A neighbouring shape; what the parent keeps stays as far as the counts allow."""
        now = dict(parent.counts)
        at = self.shapes.index(now) if now in self.shapes else 0
        near = [i for i in (at - 2, at - 1, at + 1, at + 2) if 0 <= i < len(self.shapes)]
        counts = self.shapes[self.draws.choice(near)]
        kept: dict[str, tuple[int, ...]] = {}
        for line, score in self.scores.items():
            axis = line.partition(".")[0]
            if axis not in counts:
                continue
            before = parent.of(line)
            liked = score / score.max().clamp(min=1e-30)
            if before is not None:
                liked = liked.index_add(0, torch.tensor(before), torch.full((len(before),), 2.0, dtype=liked.dtype))
            kept[line] = tuple(largest(liked, counts[axis]).tolist())
        return _genome(counts, kept)

    def _changed(self, parent: Genome, axis: str) -> Genome:
        kept = dict(parent.kept)
        line = LAYERS
        if AXES[axis].per_layer:
            # A change in a layer that is left out would change nothing.
            stays = parent.of(LAYERS) or tuple(range(self.sizes.layers))
            line = f"{axis}.{self.draws.choice(stays)}"
        if axis == FFN:
            noise = torch.tensor([self.draws.gammavariate(1.0, 1.0) for _ in self.scores[line]], dtype=torch.float64)
            shaken = self.scores[line].clamp(min=1e-30).log() - self.draws.choice(NOISES) * noise.log()
            kept[line] = tuple(largest(shaken, len(kept[line])).tolist())
        else:
            inside = set(kept[line])
            outside = [i for i in range(AXES[axis].length(self.sizes)) if i not in inside]
            inside.remove(self.draws.choice(kept[line]))
            kept[line] = tuple(sorted({*inside, self.draws.choice(outside)}))
        return _genome(dict(parent.counts), kept)


def _genome(counts: Mapping[str, int], kept: Mapping[str, tuple[int, ...]]) -> Genome:
    return Genome(tuple(sorted(counts.items())), tuple(sorted(kept.items())))


def shapes_alike(
    sizes: ModelSizes,
    asked: Mapping[str, int],
    grids: Mapping[str, Sequence[int]],
    tolerance: float = 0.01,
    of_the_cut: float = 0.04,
) -> list[dict[str, int]]:
    """Shapes that cut every axis of one that was asked for and have about its parameters; the asked one is there.

    Args:
        sizes: of the base.
        asked: counts by axis.
        grids: counts to try by axis, ascending, all below the base's.
        tolerance: a shape differs by this share of the asked one's parameters at most,
        of_the_cut: and by this share of what the asked one cuts: a small cut stays one.
    """
    wanted = sizes.with_counts(asked).parameters
    most = min(tolerance * wanted, of_the_cut * (sizes.parameters - wanted))
    found: list[dict[str, int]] = [dict(asked)]
    partial: list[dict[str, int]] = [{}]
    for axis in sorted(asked, key=lambda axis: len(grids[axis])):
        partial = [{**one, axis: count} for one in partial for count in grids[axis]]
    for counts in partial:
        if counts != asked and abs(sizes.with_counts(counts).parameters - wanted) <= most:
            found.append(counts)
    return sorted(found, key=lambda counts: [counts[axis] for axis in sorted(counts)])
