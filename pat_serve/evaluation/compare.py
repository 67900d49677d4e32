"""Turn the models' outcomes on every item into estimates and comparisons with the first model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pat_serve.evaluation.outcomes import Answers, Likelihoods
from pat_serve.evaluation.paired import (
    Floats,
    Interval,
    mcnemar_exact,
    mean_ratio,
    paired_difference,
    paired_mean_difference,
    perplexity_ratio,
)
from pat_serve.evaluation.report import Comparison, Measure, Result

_OTHER_TOKENS = (
    "The models split this text into different tokens, and perplexities per token cannot be compared then: no ratio is "
    "given."
)
_OTHER_ITEMS = "The models were not measured on the same items: no ratio is given."


def perplexity_measure(of: str, outcomes: Mapping[str, Likelihoods], settings: dict[str, Any]) -> Measure:
    """Perplexity of each model, the first being the reference.

    Args:
        of: the data's name.
        outcomes: by model, in order.
        settings: for the report.
    """
    results, notes = [], []
    first = next(iter(outcomes.values()))
    for model, outcome in outcomes.items():
        result = _perplexity(model, np.asarray(outcome.sums), np.asarray(outcome.counts, dtype=np.float64))
        if outcome.sha256 != first.sha256:
            notes.append(_OTHER_TOKENS)
        elif outcome is not first:
            found = perplexity_ratio(np.asarray(first.sums), np.asarray(outcome.sums), np.asarray(outcome.counts))
            result = _compared(result, _comparison(found), higher_is_better=False)
        if outcome.left_out:
            notes.append(f"{model}: {outcome.left_out} rows left out, their prompt alone fills an example.")
        results.append(result)
    return Measure(
        name=f"ppl({of})", metric="ppl", of=of, higher_is_better=False, settings=settings,
        notes=list(dict.fromkeys(notes)), results=results,
    )  # fmt: skip


def answer_measures(
    of: str, outcomes: Mapping[str, Sequence[Answers]], settings: dict[str, Any], notes: Sequence[str] = ()
) -> list[Measure]:
    """All measures of one task, or of the mean of several.

    Args:
        of: the task's name.
        outcomes: by model, in order; one entry for each task of a mean, the same tasks for every model.
        settings: for the report.
        notes: for the report.

    Returns:
        the main metric; acc_norm, where all have it; answer_nll likewise, the mean negative log-likelihood of a right
        answer in nats, which moves before an accuracy does.
    """
    parts = [answers for each in outcomes.values() for answers in each]
    items = {model: [answers.items for answers in each] for model, each in outcomes.items()}
    scored = {parts[0].metric: "right"}
    if all(answers.normalized is not None for answers in parts):
        scored["acc_norm"] = "normalized"
    if all(answers.gold_nll is not None for answers in parts):
        scored["answer_nll"] = "gold_nll"
    return [
        score_measure(
            of, metric, _side(outcomes, field), items, settings, notes, higher_is_better=metric != "answer_nll"
        )
        for metric, field in scored.items()
    ]


def _side(outcomes: Mapping[str, Sequence[Answers]], field: str) -> dict[str, list[Floats]]:
    return {
        model: [np.asarray(getattr(answers, field), dtype=np.float64) for answers in each]
        for model, each in outcomes.items()
    }


def score_measure(
    of: str,
    metric: str,
    scores: Mapping[str, list[Floats]],
    items: Mapping[str, Sequence[object]],
    settings: dict[str, Any],
    notes: Sequence[str] = (),
    *,
    higher_is_better: bool,
) -> Measure:
    """The mean of scores, every model compared with the first.

    Args:
        of: the data's or task's name.
        metric: of the scores.
        scores: by model, in order; an array for each task of a mean.
        items: by model, what tells its items from others; models of other items are not compared.
        settings: for the report.
        notes: for the report.
        higher_is_better: whether more is better.
    """
    results, told = [], list(notes)
    first = next(iter(scores))
    for model, tasks in scores.items():
        result = Result(
            model=model,
            value=float(np.mean([task.mean() for task in tasks])),
            standard_error=_finite(math.sqrt(sum(_variance_of_mean(task) for task in tasks)) / len(tasks)),
            items=sum(len(task) for task in tasks),
        )
        if items[first] != items[model]:
            told.append(_OTHER_ITEMS)
        elif model != first:
            comparison = _comparison(mean_ratio(scores[first], tasks))
            if len(tasks) == 1:
                found = _one_task(scores[first][0], tasks[0], higher_is_better=higher_is_better)
                comparison = comparison.model_copy(update=found)
            result = _compared(result, comparison, higher_is_better=higher_is_better)
        results.append(result)
    return Measure(
        name=f"{metric}({of})", metric=metric, of=of, higher_is_better=higher_is_better, settings=settings,
        notes=list(dict.fromkeys(told)), results=results,
    )  # fmt: skip


def _one_task(before_N: Floats, after_N: Floats, *, higher_is_better: bool) -> dict[str, Any]:
    """The fields that only one task has: the difference, and the exact test of right and wrong answers."""
    if not all(set(np.unique(side)) <= {0.0, 1.0} for side in (before_N, after_N)):
        difference, low, high = paired_mean_difference(before_N, after_N)
        return {"difference": difference, "difference_low": _finite(low), "difference_high": _finite(high)}
    more, fewer, p_value = mcnemar_exact(before_N, after_N)
    low, high = paired_difference(more, fewer, len(before_N))
    # A loop is a score of 1 that nobody wants: an answer without one is won.
    won, lost = (more, fewer) if higher_is_better else (fewer, more)
    return {
        "p_value": p_value, "test": "McNemar, exact", "won": won, "lost": lost,
        "difference": (more - fewer) / len(before_N), "difference_low": low, "difference_high": high,
    }  # fmt: skip


def _perplexity(model: str, sums_N: Floats, counts_N: Floats) -> Result:
    """Summarize as `pat_serve.perplexity.summarize_nll` does: the standard error is that of a ratio estimator."""
    tokens = float(counts_N.sum())
    mean = float(sums_N.sum()) / tokens
    error = _finite(float(np.sqrt(np.square(sums_N - mean * counts_N).sum())) / tokens) if len(sums_N) > 1 else None
    value = math.exp(min(mean, 700.0))
    return Result(
        model=model,
        value=value,
        standard_error=None if error is None else error * value,
        items=len(sums_N),
        tokens=int(tokens),
        nll_nats=mean,
        nll_standard_error_nats=error,
    )


def _compared(result: Result, comparison: Comparison, *, higher_is_better: bool) -> Result:
    ratio = comparison.ratio
    kept = None
    # A ratio of zero means that nothing was kept. It has no inverse, which is needed where less is better.
    if ratio is not None and (ratio or higher_is_better):
        kept = 100 * (ratio if higher_is_better else 1 / ratio)
    return result.model_copy(update={"versus_first": comparison, "retention_percent": kept})


def _comparison(found: Interval) -> Comparison:
    return Comparison(
        ratio=_finite(found.ratio),
        low=_finite(found.low),
        high=_finite(found.high),
        p_value=_finite(found.p_value),
        test="paired bootstrap",
    )


def _variance_of_mean(scores_N: Floats) -> float:
    return float(scores_N.var(ddof=1)) / len(scores_N) if len(scores_N) > 1 else float("nan")


def _finite(value: float) -> float | None:
    """Replace NaN and infinity by None, because JSON has neither."""
    return value if math.isfinite(value) else None
