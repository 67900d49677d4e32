"""Shapes of about the same size that a search compares. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import AXES, FFN, LAYERS
from pat_serve.shapes.candidates import MIXES, axis_grid, counts_for_ratio, exported_sizes, share_cut
from pat_serve.shapes.sizes import ModelSizes, decode_bytes

# A candidate cuts at most this much more or less than what was asked for.
WITHIN = 0.015
# Layers give this share of what a mix of layers and FFN channels cuts: a few of them, as most do, nearly all.
_LAYERS_SHARES = (0.35, 0.8)
# A decode step of one request with this many tokens in its cache.
CONTEXT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape to be tried.

    Attributes:
        shape: counts by axis.
        cut: the share of all parameters that it cuts.
        speedup: the ceiling of its decode steps over the base's, batch 1, 128 tokens of context, by the bytes read.
    """

    shape: dict[str, int]
    cut: float
    speedup: float

    def told(self) -> str:
        """The candidate's counts, as `--shape` takes them."""
        return ",".join(f"{axis}={count}" for axis, count in self.shape.items())


def candidates(checkpoint: Checkpoint, ratio: float, among: Collection[str] = tuple(AXES)) -> list[Candidate]:
    """The mixes of `pat-shapes` that meet a share of all parameters, and two leaning mixes of layers and FFN channels.

    A tied base stays tied.

    Args:
        checkpoint: the base.
        ratio: share of all parameters to cut.
        among: axes that may be cut.

    Raises:
        IllegalRatio: the share is outside (0, 0.6].
    """
    base, family, config = checkpoint.sizes, checkpoint.family, checkpoint.config
    found = [counts_for_ratio(base, family, ratio, axes, config=config) for axes in MIXES]
    shapes = [shape for shape in [*found, *_leaning(base, checkpoint, ratio)] if shape and set(shape) <= set(among)]
    made: dict[tuple[tuple[str, int], ...], Candidate] = {}
    for shape in shapes:
        exported = exported_sizes(base, shape)
        cut = share_cut(base, exported)
        if abs(cut - ratio) <= WITHIN:
            made[tuple(shape.items())] = Candidate(shape=shape, cut=cut, speedup=_bytes(base) / _bytes(exported))
    return list(made.values())


def _leaning(base: ModelSizes, checkpoint: Checkpoint, ratio: float) -> list[dict[str, int] | None]:
    """Mixes of layers and FFN channels in which one of them gives more than its even part."""
    layers, ffn = (axis_grid(axis, base, checkpoint.family) for axis in (LAYERS, FFN))
    if not layers or not ffn:
        return []
    found: list[dict[str, int] | None] = []
    for share in _LAYERS_SHARES:
        kept = min(layers, key=lambda count: abs(share_cut(base, base.with_counts({LAYERS: count})) - ratio * share))
        channels = _nearest(base, kept, ffn, ratio)
        counts = {LAYERS: kept, FFN: channels}
        is_legal = not checkpoint.family.obstacles(base, base.with_counts(counts), checkpoint.config)
        found.append({axis: counts[axis] for axis in AXES if axis in counts} if is_legal else None)
    return found


def _nearest(base: ModelSizes, layers: int, ffn: Sequence[int], ratio: float) -> int:
    return min(ffn, key=lambda count: abs(share_cut(base, base.with_counts({LAYERS: layers, FFN: count})) - ratio))


def _bytes(sizes: ModelSizes) -> float:
    return decode_bytes(sizes, batch_size=1, context_tokens=CONTEXT_TOKENS, dtype_bytes=2)
