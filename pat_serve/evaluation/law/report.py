"""The findings of a law about a run: its floor, the tokens for a target, and whether it foretells the run's end."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pat_serve.evaluation.law.curve import Curve
from pat_serve.evaluation.law.fit import LEAST_POINTS, Interval, Law, fit_law


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Part):
    """A figure with its 95 % interval; None is infinite."""

    value: float | None
    low: float | None
    high: float | None


class Foretold(_Part):
    """A law of a run's first part, held against the rest.

    Attributes:
        points: that it was fitted to.
        until: tokens (or steps) of the last of these.
        at: tokens of the run's last evaluation.
        foretold: loss there, nats, with the interval of a measurement.
        measured: loss there.
        inside: whether the measured one lies in the interval.
        unchanged: loss at `until`; who says that nothing more comes is off by this one's distance to the measured.
    """

    points: int
    until: float
    at: float
    foretold: Figure
    measured: float
    inside: bool
    unchanged: float


class Verdict(_Part):
    """The findings of a law about a target.

    Attributes:
        perplexity: the target.
        tokens: until it, in `unit`.
        outcome: "reached" by a measurement of the run, "reachable", "not reachable" where the floor's whole interval
            lies above it, else "unclear".
    """

    perplexity: float
    tokens: Figure
    outcome: Literal["reached", "reachable", "not reachable", "unclear"]


class RunLaw(_Part):
    """The law of one run.

    Attributes:
        run: its name.
        unit: of D: "tokens" or "steps".
        points: evaluations that were fitted.
        last: D of the last one.
        measured: perplexity there.
        floor: A, as a perplexity.
        exponent: b.
        residual_nats: spread of the evaluations around the law.
        foretold: the check on the run itself; None where it has too few evaluations.
        target: None without one.
    """

    run: str
    unit: str
    points: int
    last: float
    measured: float
    floor: Figure
    exponent: float
    residual_nats: float
    foretold: Foretold | None
    target: Verdict | None


def law_of(curve: Curve, *, target: float | None = None, first_part: float = 0.5, skip: int = 0) -> RunLaw:
    """Fit a run's law, hold it against the run's own end, and look for a target.

    Args:
        curve: the run's evaluations.
        target: perplexity that is wanted.
        first_part: share of the run's tokens that the check is fitted to.
        skip: evaluations at the start that are left out of every fit: those of the warm-up.
    """
    fitted = curve.part(skip)
    law = fit_law(fitted.tokens, fitted.losses)
    floor = law.at(math.inf)
    return RunLaw(
        run=curve.name,
        unit=curve.unit,
        points=len(fitted.tokens),
        last=float(curve.tokens[-1]),
        measured=math.exp(curve.losses[-1]),
        floor=_figure(Interval(value=math.exp(floor.value), low=math.exp(floor.low), high=_exp(floor.high))),
        exponent=law.exponent,
        residual_nats=law.residual,
        foretold=_foretold(fitted, first_part),
        target=None if target is None else _verdict(curve, law, floor, target),
    )


def lines(law: RunLaw) -> list[str]:
    """A law for a person."""
    told = [
        f"{law.run}: {law.points} evaluations to {_count(law.last)} {law.unit}, perplexity {law.measured:.2f} there",
        f"  law: exponent {law.exponent:.2f}, floor {_told(law.floor)}, spread {law.residual_nats:.4f} nats",
    ]
    if law.foretold is not None:
        check = law.foretold
        told.append(
            f"  check: {check.points} evaluations to {_count(check.until)} foretell {_told(check.foretold, 4)} nats at "
            f"{_count(check.at)}; measured {check.measured:.4f} ({'inside' if check.inside else 'OUTSIDE'}); "
            f"{check.unchanged:.4f} if nothing more had come"
        )
    if law.target is not None:
        goal = law.target
        if goal.outcome == "not reachable":
            told.append(f"  perplexity {goal.perplexity:g}: not reachable at this shape: the floor is above it")
        elif goal.outcome == "reached":
            told.append(f"  perplexity {goal.perplexity:g}: reached after {_count(goal.tokens.value)} {law.unit}")
        else:
            low, value, high = (_count(end) for end in (goal.tokens.low, goal.tokens.value, goal.tokens.high))
            unclear = "" if goal.outcome == "reachable" else ", and it is unclear whether the floor is below it"
            told.append(f"  perplexity {goal.perplexity:g}: {value} {law.unit} (95 %: {low} to {high}){unclear}")
    return told


def _foretold(curve: Curve, share: float) -> Foretold | None:
    # A curve's first part is meant in tokens: evaluations need not be evenly spaced.
    count = int(np.searchsorted(curve.tokens, share * curve.tokens[-1], side="right"))
    if not LEAST_POINTS <= count < len(curve.tokens):
        return None
    first = curve.part(0, count)
    end = float(curve.tokens[-1])
    said = fit_law(first.tokens, first.losses).at(end, measured=True)
    measured = float(curve.losses[-1])
    return Foretold(
        points=count,
        until=float(first.tokens[-1]),
        at=end,
        foretold=_figure(said),
        measured=measured,
        inside=said.low <= measured <= said.high,
        unchanged=float(first.losses[-1]),
    )


def _verdict(curve: Curve, law: Law, floor: Interval, target: float) -> Verdict:
    loss = math.log(target)
    below = np.flatnonzero(curve.losses <= loss)
    if len(below):
        at = float(curve.tokens[below[0]])
        return Verdict(perplexity=target, tokens=Figure(value=at, low=at, high=at), outcome="reached")
    tokens = law.tokens_for(loss)
    outcome: Literal["reachable", "not reachable", "unclear"] = "reachable"
    if floor.low > loss:
        outcome = "not reachable"
    elif math.isinf(tokens.high):
        outcome = "unclear"
    return Verdict(perplexity=target, tokens=_figure(tokens), outcome=outcome)


def _figure(interval: Interval) -> Figure:
    ends = (end if math.isfinite(end) else None for end in (interval.value, interval.low, interval.high))
    value, low, high = ends
    return Figure(value=value, low=low, high=high)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _told(figure: Figure, digits: int = 2) -> str:
    value, low, high = (
        "infinite" if end is None else f"{end:.{digits}f}" for end in (figure.value, figure.low, figure.high)
    )
    return f"{value} (95 %: {low} to {high})"


def _count(number: float | None) -> str:
    if number is None:
        return "no number"
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.3g}"
