"""Look for the shape: cut every candidate once, rank them by what they lose, tune the best for a while, keep the best.

What is lost is the KL divergence from the dense model on rows that neither calibration nor tuning sees. Untuned
candidates are ranked by it, because all are about as large; speeds are told beside it. The order of the best can turn
within some hundred steps of tuning, so as many of them as the time allows are tuned for equally many steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.errors import UsageError
from pat_serve.files.atomic import write_json
from pat_serve.terminal.progress import say
from pat_serve.training.assemble import assemble
from pat_serve.training.checks.prepare import Prepared, prepare
from pat_serve.training.checks.width import target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data.encoding import Example
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import calibration_batches
from pat_serve.training.model.teacher import load_teacher
from pat_serve.training.ranks import Ranks
from pat_serve.training.search.candidates import Candidate, candidates
from pat_serve.training.search.measure import HeldOut

SEARCH_FILE = "search.json"
# Rows that a cut is measured on, and rows that a candidate is calibrated on; its run takes all that it is given.
_MEASURED_ROWS, _CALIBRATED_ROWS = 24, 32
# The dense model's answers are kept: a row of the vocabulary for each token.
_MEASURED_TOKENS = 4096
# So many of the best are tuned; fewer steps than the least tell nothing.
_TUNED, _LEAST_STEPS, _MOST_STEPS = 3, 8, 200
_PILOT_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate, and what it lost.

    Attributes:
        candidate: the shape.
        kl: nats a token, right after the cut.
        tuned_kl: after the search's own steps; None where it was not tuned.
        steps: that it was tuned for.
        seconds: that cutting it took.
    """

    candidate: Candidate
    kl: float
    seconds: float
    tuned_kl: float | None = None
    steps: int = 0

    def record(self) -> dict[str, Any]:
        """A line of search.json."""
        return {
            "shape": self.candidate.shape,
            "cut": round(self.candidate.cut, 4),
            "ceiling_1x128": round(self.candidate.speedup, 3),
            "kl": self.kl,
            "tuned_kl": self.tuned_kl,
            "tuned_steps": self.steps,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True, kw_only=True)
class Search:
    """A finished search.

    Attributes:
        ratio: that was asked for.
        minutes: that it was given.
        tried: the candidates, the best first.
        skipped: shapes that there was no time to cut.
    """

    ratio: float
    minutes: float
    tried: list[Tried]
    skipped: list[str] = field(default_factory=list)

    @property
    def shape(self) -> dict[str, int]:
        """The best candidate's."""
        return self.tried[0].candidate.shape

    def save(self, run: Path) -> None:
        """Write search.json, complete or not at all."""
        lines = [one.record() for one in self.tried]
        asked = {"ratio": self.ratio, "minutes": self.minutes}
        write_json(run / SEARCH_FILE, {**asked, "shape": self.shape, "tried": lines, "skipped": self.skipped})


def wants_search(recipe: TrainRecipe) -> bool:
    """Whether a recipe leaves its shape to a search."""
    return recipe.search_minutes > 0


def with_shape(recipe: TrainRecipe, shape: dict[str, int]) -> TrainRecipe:
    """The recipe of a search with the shape that it found; the method follows the shape."""
    settings = recipe.model_dump(exclude_unset=True)
    left = {name: value for name, value in settings.items() if name not in ("ratio", "axes", "search_minutes")}
    return TrainRecipe.build({**left, "shape": shape}, "the search")


def as_found(recipe: TrainRecipe, run: Path) -> TrainRecipe:
    """A recipe as its run has it: with the shape that was found, where it asks for the search that the run began with.

    Args:
        recipe: as it is asked for now.
        run: an earlier run's folder.
    """
    path = run / SEARCH_FILE
    if not wants_search(recipe) or not path.is_file():
        return recipe
    record = json.loads(path.read_text(encoding="utf-8"))
    is_same = (record["ratio"], record["minutes"]) == (_ratio(recipe), recipe.search_minutes)
    return with_shape(recipe, record["shape"]) if is_same else recipe


def search(recipe: TrainRecipe) -> Search:
    """Find the shape for a recipe's ratio, and tell what was found.

    Args:
        recipe: one that wants a search; its data, its calibration and its settings are those of the run.

    Raises:
        UsageError: several processes train together, or no shape comes near to the ratio.
    """
    ranks = Ranks.join()
    if ranks.count > 1:
        raise UsageError(
            "--search-minutes",
            expected="one process",
            found=f"{ranks.count} that train together",
            fix="Search with one process first, and give the others the --shape that it says.",
        )
    began, seconds = time.monotonic(), recipe.search_minutes * 60
    ratio = _ratio(recipe)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    found = candidates(checkpoint, ratio, recipe.axes or tuple(AXES))
    if not found:
        raise UsageError(
            "--ratio",
            expected="a share of all parameters that a shape comes near to",
            found=str(ratio),
            fix="Give a --shape; pat-shapes lists what is there.",
        )
    for candidate in found:
        # A setting that a candidate's method has no use for is refused now, and not after minutes.
        _resolved(recipe, candidate, checkpoint)
    say(f"search: {len(found)} shapes that cut about {ratio:.0%} of the parameters, {recipe.search_minutes:g} minutes")
    quick = recipe.model_copy(update={"calibration_rows": min(recipe.calibration_rows, _CALIBRATED_ROWS)})
    bench = _Bench(quick, found[0])
    tried: list[Tried] = []
    skipped: list[str] = []
    for candidate in found:
        spent = time.monotonic() - began
        # Half of the time is for tuning, and the first candidate is cut in any case.
        if tried and spent + max(one.seconds for one in tried) > seconds / 2:
            skipped.append(candidate.told())
            continue
        kl, _ = bench.loss(candidate, 0)
        tried.append(Tried(candidate=candidate, kl=kl, seconds=time.monotonic() - began - spent))
        say(
            f"search: {candidate.told()} cuts {candidate.cut:.1%}, decodes at most {candidate.speedup:.2f}x as fast, "
            f"KL {kl:.3f} untuned"
        )
    if skipped:
        say(f"search: no time to cut {'; '.join(skipped)}")
    tried = _tune(bench, sorted(tried, key=lambda one: one.kl), began + seconds)
    found_one = Search(ratio=ratio, minutes=recipe.search_minutes, tried=tried, skipped=skipped)
    say(f"search: takes --shape {tried[0].candidate.told()}, {_why(tried)}")
    return found_one


def _tune(bench: _Bench, tried: list[Tried], until_s: float) -> list[Tried]:
    """Tune the best for equally many steps, as the time allows; all again, the best first."""
    best, rest = tried[:_TUNED], tried[_TUNED:]
    if len(best) < 2:
        return tried
    began = time.monotonic()
    cutting = sum(one.seconds for one in best)
    if began + 2 * cutting > until_s:
        return tried
    # A step's time is that of some steps; they are not kept, since their schedule was too short.
    _, pilot_s = bench.loss(best[0].candidate, _PILOT_STEPS)
    left = until_s - time.monotonic() - cutting
    steps = min(_MOST_STEPS, int(left / len(best) / (pilot_s / _PILOT_STEPS)))
    if steps < _LEAST_STEPS:
        say(f"search: no time to tune the best {len(best)} for {_LEAST_STEPS} steps")
        return tried
    tuned = []
    for one in best:
        kl, _ = bench.loss(one.candidate, steps)
        tuned.append(replace(one, tuned_kl=kl, steps=steps))
        say(f"search: {one.candidate.told()}: KL {kl:.3f} after {steps} steps")
    return [*sorted(tuned, key=lambda one: one.tuned_kl or 0.0), *rest]


def _resolved(recipe: TrainRecipe, candidate: Candidate, checkpoint: Checkpoint) -> TrainRecipe:
    """The recipe of a candidate's run, with every `auto` decided."""
    recipe = with_shape(recipe, candidate.shape).with_rate(checkpoint.hidden_size)
    method = method_of(recipe)
    return recipe.resolved(tied=checkpoint.tied, prunes=method.prunes, narrows=HIDDEN in method.axes)


def _ratio(recipe: TrainRecipe) -> float:
    return 0.25 if recipe.ratio is None else recipe.ratio


def _why(tried: Sequence[Tried]) -> str:
    """The figures of the best and of the next, as a part of a sentence."""
    best = tried[0]
    told = f"KL {best.kl:.3f} untuned" if best.tuned_kl is None else f"KL {best.tuned_kl:.3f} after {best.steps} steps"
    if len(tried) < 2:
        return told
    other = tried[1].tuned_kl if best.tuned_kl is not None else tried[1].kl
    return f"{told}; the next is {tried[1].candidate.told()} with {other:.3f}"


class _Bench:
    """Cuts and tunes candidates on the data of a run, which is read once.

    Args:
        recipe: of the search.
        first: a candidate, whose sizes the pre-flight is asked about.
    """

    def __init__(self, recipe: TrainRecipe, first: Candidate) -> None:
        self._recipe = recipe
        self._prepared = prepare(with_shape(recipe, first.shape).model_copy(update={"max_steps": 0}), Ranks.join())
        data = self._prepared.data
        if data.held_out is not None:
            rows = data.held_out[:_MEASURED_ROWS]
        elif isinstance(data.train, list) and not recipe.packing and len(data.train) >= 2 * _MEASURED_ROWS:
            rows = data.train[-_MEASURED_ROWS:]
            self._prepared = replace(self._prepared, data=replace(data, train=data.train[:-_MEASURED_ROWS]))
        else:
            # There is nothing else: rows that every candidate has been calibrated on.
            rows = data.samples[:_MEASURED_ROWS]
        dense = load_teacher(self._prepared.checkpoint, getattr(torch, self._prepared.inputs.dtype))
        self._held_out = HeldOut.of(dense, calibration_batches(_bounded(rows), 1))

    def loss(self, candidate: Candidate, steps: int) -> tuple[float, float]:
        """Cut a candidate, tune it, and measure: its KL in nats a token, and the seconds that the steps took."""
        with tempfile.TemporaryDirectory() as folder:
            job = assemble(self._prepared_for(candidate, steps), Path(folder), Ranks.join(), resumes=False)
            began = time.monotonic()
            if steps:
                arguments = job.trainer.args
                arguments.save_strategy = arguments.eval_strategy = "no"
                try:
                    job.trainer.train()
                finally:
                    job.display.close()
            seconds = time.monotonic() - began
            return self._held_out.losses(job.trainer.model)[1], seconds

    def _prepared_for(self, candidate: Candidate, steps: int) -> Prepared:
        checkpoint = self._prepared.checkpoint
        recipe = _resolved(self._recipe, candidate, checkpoint)
        method = method_of(recipe)
        inputs = self._prepared.inputs.model_copy(
            update={
                "shape": target_shape(recipe, checkpoint),
                "total_steps": steps,
                "narrow": method.stays_wide(recipe) is None,
                "keeps_tie": recipe.keeps_tie,
            }
        )
        return replace(self._prepared, recipe=recipe, inputs=inputs)


def _bounded(rows: Sequence[Example]) -> list[Example]:
    """The first rows, as far as their tokens that count are few enough; one row at least."""
    taken: list[Example] = []
    tokens = 0
    for row in rows:
        tokens += sum(label >= 0 for label in row["labels"])
        if taken and tokens > _MEASURED_TOKENS:
            break
        taken.append(row)
    return taken
