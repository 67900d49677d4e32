"""Bounds on what a model may have lost: `ppl <= 1.02x`, `acc(arc_easy) >= 0.97x`, `repetition <= +0.02`.

The 95 % interval of a figure is judged against its bound. An interval on one side passes or fails. An interval on both
sides is inconclusive: the data cannot say. More items make the interval narrower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pat_serve.errors import DataError, UsageError, first_line
from pat_serve.evaluation.paired import LEAST_ROWS
from pat_serve.evaluation.report import BoundResult, Measure, Result

_BOUND = re.compile(r"\s*([a-z_0-9]+)\s*(?:\(\s*([^()]+?)\s*\))?\s*(<=|>=)\s*([+-]?)(\d+(?:\.\d+)?|\.\d+)\s*(x?)\s*")
_EXAMPLE = "Write it like ppl <= 1.02x, acc(arc_easy) >= 0.97x, acc(pat14_ll) >= 0.4 or repetition <= +0.02."
# The half width of a normal distribution's 95 % interval in standard errors.
_Z = 1.96
_TAIL = 0.025
# A standard error below this is zero: the mean of equal scores may miss them by the last bit.
_ROUNDING = 1e-12

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound on one figure of every model except the first.

    Attributes:
        text: as written.
        metric: ppl, acc, ...
        of: the data or task; None: every measure of that metric.
        upper: the figure must not be above the limit; if False, it must not be below.
        limit: the number.
        relative: the limit is a multiple of the first model's figure.
        difference: the limit is added to the first model's figure.
    """

    text: str
    metric: str
    of: str | None
    upper: bool
    limit: float
    relative: bool
    difference: bool

    def covers(self, measure: Measure) -> bool:
        """Tell whether this bound is on a measure."""
        return measure.metric == self.metric and self.of in (None, measure.of)


class _GateFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    bounds: list[str] = Field(min_length=1)


def parse_bound(text: str, subject: str) -> Bound:
    """Read a bound as a user writes it.

    Args:
        text: the bound.
        subject: the flag or file that it stands in, for the message.

    Raises:
        UsageError: the text is no bound.
    """
    found = _BOUND.fullmatch(text)
    metric, of, sign, plus, number, times = found.groups() if found else ("",) * 6
    # A perplexity is compared by its ratio alone.
    if found is None or (plus and (times or metric == "ppl")):
        raise UsageError(
            subject, expected="METRIC[(NAME)] <= or >= NUMBER, NUMBERx or +NUMBER", found=repr(text), fix=_EXAMPLE
        )
    return Bound(
        text=" ".join(text.split()), metric=metric, of=of, upper=sign == "<=", limit=float(plus + number),
        relative=bool(times), difference=bool(plus),
    )  # fmt: skip


def read_gate(path: Path) -> list[Bound]:
    """Read the bounds of a gate file: YAML with `version: 1` and a list `bounds`.

    Raises:
        DataError: the file does not exist or has another form.
        UsageError: an entry is no bound.
    """
    try:
        gate = _GateFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeError, yaml.YAMLError, ValidationError) as error:
        raise DataError(
            path, expected="YAML with a list of bounds", found=first_line(error), fix=f"bounds: [...]. {_EXAMPLE}"
        ) from error
    return [parse_bound(text, str(path)) for text in gate.bounds]


def judge(bounds: Sequence[Bound], measures: Sequence[Measure]) -> list[BoundResult]:
    """Judge every bound for every model except the first.

    Raises:
        UsageError: a bound names no measured figure.
    """
    results = []
    for bound in bounds:
        covered = [measure for measure in measures if bound.covers(measure)]
        if not covered:
            raise UsageError(
                f"the bound {bound.text}",
                expected=f"one of what is measured: {', '.join(measure.name for measure in measures)}",
                found=bound.metric + (f"({bound.of})" if bound.of else ""),
                fix="Add the --data, --text, --tasks, --prompts or the like that it needs, or change the bound.",
            )
        results += [_judge(bound, measure, result) for measure in covered for result in measure.results[1:]]
    return results


def exit_code(results: Sequence[BoundResult]) -> int:
    """Exit code of a gate: 0 when all bounds are met, 1 when one is missed, else 3, since the data cannot say."""
    outcomes = {result.outcome for result in results}
    return 1 if "fail" in outcomes else 3 if "inconclusive" in outcomes else 0


def describe(result: BoundResult) -> str:
    """Describe the outcome of a bound in one line with its figures."""
    unit = "x" if result.bound.endswith("x") else ""
    if result.low is not None and result.high is not None:
        between = f" ({result.low:.4f} to {result.high:.4f})"
    else:
        between = "" if result.measured is None else ", of too few items for an interval"
    figure = "no comparable figure" if result.measured is None else f"{result.measured:.4f}{unit}"
    return f"{result.outcome}: {result.bound}: {result.model} has {figure}{between}"


def _judge(bound: Bound, measure: Measure, result: Result) -> BoundResult:
    versus = result.versus_first
    if bound.difference:
        measured = None if versus is None else versus.difference
        low, high = (None, None) if versus is None else (versus.difference_low, versus.difference_high)
    elif bound.relative:
        measured = None if versus is None else versus.ratio
        low, high = (None, None) if versus is None else (versus.low, versus.high)
    else:
        measured = result.value
        low, high = _interval(result)
    return BoundResult(
        bound=f"{measure.name} {'<=' if bound.upper else '>='} {_limit(bound)}",
        model=result.model,
        # There is no ratio when the first model has zero or other items, so nothing can be said.
        measured=measured,
        low=low,
        high=high,
        outcome="inconclusive" if measured is None else _outcome(bound, low, high),
    )


def _limit(bound: Bound) -> str:
    return f"{bound.limit:+g}" if bound.difference else f"{bound.limit:g}{'x' if bound.relative else ''}"


def _interval(result: Result) -> tuple[float | None, float | None]:
    if result.standard_error is None or (result.items < LEAST_ROWS and not _is_share(result)):
        return None, None
    if result.nll_standard_error_nats is not None:
        # A perplexity's interval is symmetric in nats.
        spread = math.exp(_Z * result.nll_standard_error_nats)
        return result.value / spread, result.value * spread
    alike = result.standard_error < _ROUNDING
    if alike and result.value not in (0, 1):
        # Nothing has a spread when every task of a mean is all right or all wrong, or all scores are alike.
        return None, None
    if alike:
        # When all answers are right or all wrong, a normal interval has no width, for any number of items. The exact
        # binomial interval (Clopper and Pearson 1934) has a width.
        beyond = 1 - _TAIL ** (1 / result.items)
        return (0.0, beyond) if result.value == 0 else (1 - beyond, 1.0)
    return result.value - _Z * result.standard_error, result.value + _Z * result.standard_error


def _is_share(result: Result) -> bool:
    """Tell whether a value is a share of right answers: only scores of 0 and 1 vary as much about a mean in [0, 1]."""
    if result.nll_standard_error_nats is not None or result.standard_error is None or not 0 <= result.value <= 1:
        return False
    most = result.value * (1 - result.value)
    return math.isclose(result.standard_error**2 * (result.items - 1), most, rel_tol=1e-6, abs_tol=1e-12)


def _outcome(bound: Bound, low: float | None, high: float | None) -> Outcome:
    if low is None or high is None:
        return "inconclusive"
    if not bound.upper:
        low, high, limit = -high, -low, -bound.limit
    else:
        limit = bound.limit
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"
