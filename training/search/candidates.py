"""Shapes of about the same size, or of about the same speed, that a search compares. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import AXES, FFN, HIDDEN, LAYERS
from pat_serve.shapes.candidates import (
    MIXES,
    axis_grid,
    counts_for_ratio,
    counts_for_speedup,
    exported_sizes,
    share_cut,
)
from pat_serve.shapes.roofline import decode_ceiling
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.config import TrainRecipe

# A candidate cuts at most this much more or less than what was asked for.
WITHIN = 0.015
# Layers give this share of what a mix of layers and FFN channels cuts: a few of them, as most do, nearly all.
_LAYERS_SHARES = (0.35, 0.8)
# A decode step of one request with this many tokens in its cache.
CONTEXT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Target:
    """A search asks for a size or for a speed, which its shapes have in common.

    Attributes:
        ratio: share of all parameters to cut.
        speedup: of a decode step, batch 1, 128 tokens of context.
    """

    ratio: float | None
    speedup: float | None

    @staticmethod
    def of(recipe: TrainRecipe) -> Target:
        """Read the target from a recipe. A recipe that names none asks for a quarter of the parameters."""
        if recipe.speedup is not None:
            return Target(ratio=None, speedup=recipe.speedup)
        return Target(ratio=0.25 if recipe.ratio is None else recipe.ratio, speedup=None)

    def is_met(self, candidate: Candidate) -> bool:
        """The candidate is about as large as asked, or at least as fast."""
        if self.ratio is not None:
            return abs(candidate.cut - self.ratio) <= WITHIN
        assert self.speedup is not None
        return candidate.speedup >= self.speedup

    def told(self) -> str:
        """The target as a part of a sentence."""
        if self.ratio is not None:
            return f"cut about {self.ratio:.0%} of the parameters"
        return f"are expected to decode at least {self.speedup:g} times as fast"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape to be tried.

    Attributes:
        shape: counts by axis.
        cut: the share of all parameters that it cuts.
        ceiling: of its decode steps' speed over the base's, by the bytes read alone; batch 1, 128 tokens of context.
        speedup: the same as it is expected with the fixed work of each layer and step.
    """

    shape: dict[str, int]
    cut: float
    ceiling: float
    speedup: float

    def told(self) -> str:
        """The candidate's counts, as `--shape` takes them."""
        return ",".join(f"{axis}={count}" for axis, count in self.shape.items())


def ceiling(base: ModelSizes, sizes: ModelSizes) -> float:
    """A decode step's speed-up by the bytes read in 16 bits alone; a layer less takes its fixed work with it, too."""
    return decode_ceiling(base, sizes, batch_size=1, context_tokens=CONTEXT_TOKENS, dtype_bytes=2)


def candidates(
    checkpoint: Checkpoint,
    target: Target,
    speedup: Callable[[ModelSizes], float],
    among: Collection[str] = tuple(AXES),
) -> list[Candidate]:
    """The mixes of `pat-shapes` that meet the target, and two leaning mixes of layers and FFN channels.

    A tied base stays tied.

    Args:
        checkpoint: the base.
        target: share of all parameters to cut, or speed.
        speedup: expected of sizes, over the base's; it rises with every cut.
        among: axes that may be cut.

    Raises:
        IllegalRatio: the share is outside (0, 0.6].
    """
    base = checkpoint.sizes
    made: dict[tuple[tuple[str, int], ...], Candidate] = {}
    for shape in _shapes(checkpoint, target, speedup):
        if not set(shape) <= set(among):
            continue
        exported = exported_sizes(base, shape)
        cut = share_cut(base, exported)
        candidate = Candidate(shape=shape, cut=cut, ceiling=ceiling(base, exported), speedup=speedup(exported))
        if target.is_met(candidate):
            made[tuple(shape.items())] = candidate
    # The stream takes longest to cut, so it comes last where the time is short.
    return sorted(made.values(), key=lambda one: HIDDEN in one.shape)


def _shapes(checkpoint: Checkpoint, target: Target, speedup: Callable[[ModelSizes], float]) -> Iterator[dict[str, int]]:
    base, family, config = checkpoint.sizes, checkpoint.family, checkpoint.config
    for axes in MIXES:
        if target.ratio is not None:
            found = counts_for_ratio(base, family, target.ratio, axes, config=config)
        else:
            assert target.speedup is not None
            found = counts_for_speedup(base, family, target.speedup, axes, speedup, config=config)
        if found:
            yield found
    yield from _leaning(base, checkpoint, target, speedup)


def _leaning(
    base: ModelSizes, checkpoint: Checkpoint, target: Target, speedup: Callable[[ModelSizes], float]
) -> Iterator[dict[str, int]]:
    """Mixes of layers and FFN channels in which one of them gives more than its even part."""
    layers, ffn = (axis_grid(axis, base, checkpoint.family) for axis in (LAYERS, FFN))
    if not layers or not ffn:
        return
    parts = {count: _part(base, base.with_counts({LAYERS: count}), target, speedup) for count in layers}
    for share in _LAYERS_SHARES:
        kept = min(layers, key=lambda count: abs(parts[count] - share))
        channels = _channels(base, kept, ffn, target, speedup)
        if channels is None:
            continue
        counts = {LAYERS: kept, FFN: channels}
        if not checkpoint.family.obstacles(base, base.with_counts(counts), checkpoint.config):
            yield {axis: counts[axis] for axis in AXES if axis in counts}


def _part(base: ModelSizes, sizes: ModelSizes, target: Target, speedup: Callable[[ModelSizes], float]) -> float:
    """How much of the target sizes give: of the parameters, or of the time that a step is to save."""
    if target.ratio is not None:
        return share_cut(base, sizes) / target.ratio
    assert target.speedup is not None
    return (1 - 1 / speedup(sizes)) / (1 - 1 / target.speedup)


def _channels(
    base: ModelSizes, kept: int, ffn: Sequence[int], target: Target, speedup: Callable[[ModelSizes], float]
) -> int | None:
    """FFN channels beside so many layers: those that come nearest to the share, or the most that are fast enough."""

    def part(count: int) -> float:
        return _part(base, base.with_counts({LAYERS: kept, FFN: count}), target, speedup)

    if target.ratio is not None:
        return min(ffn, key=lambda count: abs(part(count) - 1))
    return max((count for count in ffn if part(count) >= 1), default=None)
