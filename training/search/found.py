"""The record of a search, in memory and in `search.json`: the shapes that it tried, and the one that it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pat_serve.errors import UsageError
from pat_serve.files.atomic import write_json
from pat_serve.training.config import TrainRecipe
from pat_serve.training.search.candidates import Candidate, Target

SEARCH_FILE = "search.json"
# Settings that a found shape stands in for.
_OF_THE_SEARCH = ("ratio", "speedup", "axes", "search_minutes")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate, and what it lost.

    Attributes:
        candidate: the shape.
        kl: nats a token, right after the cut.
        seconds: that cutting it took.
        tuned_kl: after the search's own steps; None where it was not tuned.
        steps: that it was tuned for.
    """

    candidate: Candidate
    kl: float
    seconds: float
    tuned_kl: float | None = None
    steps: int = 0

    @property
    def lost(self) -> float:
        """The KL divergence that counts, in nats a token: after its steps, where it was tuned."""
        return self.kl if self.tuned_kl is None else self.tuned_kl

    @property
    def price(self) -> float:
        """Nats lost over the share of a decode step's time that is saved; infinite where nothing is saved."""
        saved = 1 - 1 / self.candidate.speedup
        return self.lost / saved if saved > 0 else math.inf

    def record(self) -> dict[str, Any]:
        """A line of search.json."""
        return {
            "shape": self.candidate.shape,
            "cut": round(self.candidate.cut, 4),
            "ceiling_1x128": round(self.candidate.ceiling, 3),
            "expected_1x128": round(self.candidate.speedup, 3),
            "kl": self.kl,
            "tuned_kl": self.tuned_kl,
            "tuned_steps": self.steps,
            # A price is of the KL that counts, so those of untuned and of tuned shapes do not compare.
            "price": self.price if math.isfinite(self.price) else None,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True, kw_only=True)
class Search:
    """A finished search.

    Attributes:
        target: size or speed that was asked for.
        axes: that were to be cut; empty for any.
        minutes: that it was given; 0 where a rule decided (speed.py).
        shape: that it takes.
        tried: the candidates, the best first; none where a rule decided.
        skipped: shapes that there was no time to cut.
    """

    target: Target
    axes: tuple[str, ...]
    minutes: float
    shape: dict[str, int]
    tried: list[Tried]
    skipped: list[str] = field(default_factory=list)

    def save(self, run: Path) -> None:
        """Write search.json, complete or not at all."""
        lines = [one.record() for one in self.tried]
        asked = _asked(self.target, self.axes, self.minutes)
        write_json(run / SEARCH_FILE, {**asked, "shape": self.shape, "tried": lines, "skipped": self.skipped})


def ranked(tried: list[Tried], target: Target) -> list[Tried]:
    """Candidates, the best first.

    Where a speed was asked for, all are fast enough, and the one that lost least is the best. Where a size was, speeds
    differ, and the one that lost least for the time that it saves is. A loss grows at least in proportion to the cut.
    So a slower candidate with a higher price stays behind if it is cut until it is as fast. One with a lower price may
    fall behind then: who wants a speed asks for it.
    """
    if target.ratio is None:
        return sorted(tried, key=lambda one: one.lost)
    return sorted(tried, key=lambda one: (one.price, one.lost))


def wants_search(recipe: TrainRecipe) -> bool:
    """Whether a recipe leaves its shape to a search."""
    return recipe.search_minutes > 0


def leaves_shape_open(recipe: TrainRecipe) -> bool:
    """Whether the shape of a recipe is found before its run: by a search, or by a rule for the speed it asks for."""
    return wants_search(recipe) or recipe.speedup is not None


def with_shape(recipe: TrainRecipe, shape: dict[str, int]) -> TrainRecipe:
    """The recipe of a search with the shape that it found; the method follows the shape."""
    settings = recipe.model_dump(exclude_unset=True)
    left = {name: value for name, value in settings.items() if name not in _OF_THE_SEARCH}
    # A choice along an axis that this shape leaves whole decides nothing.
    left |= {"choose": {axis: name for axis, name in recipe.choose.items() if axis in shape}} if recipe.choose else {}
    return TrainRecipe.build({**left, "shape": shape}, "the search")


def as_found(recipe: TrainRecipe, run: Path) -> TrainRecipe:
    """A recipe as its run has it: with the shape that was found, where it asks for the search that the run began with.

    Args:
        recipe: as it is asked for now.
        run: an earlier run's folder.

    Raises:
        UsageError: the run began with another search.
    """
    path = run / SEARCH_FILE
    if not leaves_shape_open(recipe) or not path.is_file():
        return recipe
    record = json.loads(path.read_text(encoding="utf-8"))
    asked = _asked(Target.of(recipe), recipe.axes, recipe.search_minutes)
    # Older records have neither a speed nor axes: the first was not there, the second are not known.
    began = {name: record.get(name, None if name == "speedup" else now) for name, now in asked.items()}
    if changed := [name for name in asked if asked[name] != began[name]]:
        raise UsageError(
            f"--resume auto --out {run}",
            expected="the search that the run began with: " + ", ".join(f"{name} {began[name]}" for name in changed),
            found=", ".join(str(asked[name]) for name in changed),
            fix="Give the same settings, or another --out.",
        )
    return with_shape(recipe, record["shape"])


def _asked(target: Target, axes: Sequence[str], minutes: float) -> dict[str, Any]:
    """Name the settings of a search as search.json does."""
    return {"ratio": target.ratio, "speedup": target.speedup, "axes": sorted(axes), "minutes": minutes}
