"""Look for the shape: cut every candidate once, rank them by what they lose, tune the best for a while, keep the best.

What is lost is the KL divergence from the dense model on rows that neither calibration nor tuning sees, and what is won
is time: a short probe of layers of the base's sizes says what a step of each shape takes on this machine. The order of
the best can turn within some hundred steps of tuning, so as many of them as the time allows are tuned for equally many
steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.axes import AXES
from pat_serve.errors import UsageError
from pat_serve.terminal.progress import say
from pat_serve.training.config import TrainRecipe
from pat_serve.training.ranks import Ranks
from pat_serve.training.search.bench import Bench, resolved_for
from pat_serve.training.search.candidates import Target, candidates
from pat_serve.training.search.found import Search, Tried, ranked
from pat_serve.training.search.speed import expected_speedup, out_of_reach

# So many of the best are tuned; fewer steps than the least tell nothing.
_TUNED, _LEAST_STEPS, _MOST_STEPS = 3, 8, 200
_PILOT_STEPS = 2


def search(recipe: TrainRecipe) -> Search:
    """Find the shape for a recipe's ratio or speed, and tell what was found.

    Args:
        recipe: one that wants a search; its data, its calibration and its settings are those of the run.

    Raises:
        UsageError: several processes train together, or no shape comes near to what is asked for.
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
    target = Target.of(recipe)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    among = recipe.axes or tuple(AXES)
    found = candidates(checkpoint, target, expected_speedup(checkpoint.sizes), among)
    if not found:
        raise out_of_reach(target)
    for candidate in found:
        # A setting that a candidate's method has no use for is refused now, and not after minutes.
        resolved_for(recipe, candidate, checkpoint)
    say(f"search: reads the data, and checks the memory with {found[0].told()}")
    bench = Bench(recipe, found[0])
    say(f"search: {recipe.search_minutes:g} minutes for the shapes that {target.told()}, {len(found)} of them")
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
            f"search: {candidate.told()} cuts {candidate.cut:.1%}, is expected to decode {candidate.speedup:.2f}x as "
            f"fast ({candidate.ceiling:.2f}x by its bytes), KL {kl:.3f} untuned"
        )
    if skipped:
        say(f"search: no time to cut {'; '.join(skipped)} (a longer --search-minutes has)")
    tried = _tune(bench, ranked(tried, target), target, began + seconds)
    say(f"search: takes --shape {tried[0].candidate.told()}, {_why(tried, target)}")
    return Search(
        target=target,
        axes=recipe.axes,
        minutes=recipe.search_minutes,
        shape=tried[0].candidate.shape,
        tried=tried,
        skipped=skipped,
    )


def _tune(bench: Bench, tried: list[Tried], target: Target, until_s: float) -> list[Tried]:
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
    return [*ranked(tuned, target), *rest]


def _why(tried: Sequence[Tried], target: Target) -> str:
    """The figures of the best and of the next, as a part of a sentence."""
    best = tried[0]
    told = f"KL {best.kl:.3f} untuned" if best.tuned_kl is None else f"KL {best.tuned_kl:.3f} after {best.steps} steps"
    if target.ratio is not None:
        told += f" for {1 - 1 / best.candidate.speedup:.0%} of a step's time"
    if len(tried) < 2:
        return told
    other = tried[1]
    gives = "" if target.ratio is None else f" for {1 - 1 / other.candidate.speedup:.0%}"
    return f"{told}; the next is {other.candidate.told()} with {other.lost:.3f}{gives}"
