from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from pat_serve.evaluation.compare import answer_measures, perplexity_measure
from pat_serve.evaluation.gate import judge, parse_bound
from pat_serve.evaluation.outcomes import Answers, Likelihoods
from pat_serve.evaluation.paired import mcnemar_exact, mean_ratio, paired_difference, perplexity_ratio


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (0, 1), (3, 9), (20, 20), (900, 1100)])
def test_mcnemar_is_the_binomial_test(won: int, lost: int):
    before = np.array([0.0] * won + [1.0] * lost + [1.0] * 5 + [0.0] * 7)
    after = np.array([1.0] * won + [0.0] * lost + [1.0] * 5 + [0.0] * 7)
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar_exact(before, after)[:2] == (won, lost)
    assert mcnemar_exact(before, after)[2] == pytest.approx(expected)


def test_perplexity_ratio_of_a_known_difference():
    random = np.random.default_rng(0)
    counts = random.integers(50, 60, 400).astype(float)
    before = counts * random.normal(3.0, 1.0, 400)
    # 0.02 nats a token worse, with little noise on top of a spread of a whole nat.
    after = before + counts * random.normal(0.02, 0.01, 400)
    found = perplexity_ratio(before, after, counts)
    assert found.ratio == pytest.approx(math.exp((after - before).sum() / counts.sum()))
    assert found.low < found.ratio < found.high
    # Pairing sees through the spread between rows: the interval is a fiftieth of what the rows' own spread gives.
    assert found.high - found.low < 0.003
    assert found.p_value < 0.001


def test_intervals_cover_as_often_as_they_say():
    """200 samples with a true ratio of 1: the 95 % interval misses it about 10 times."""
    random = np.random.default_rng(1)
    missed = 0
    for number in range(200):
        differences = random.normal(0, 1, 100)
        found = perplexity_ratio(np.zeros(100), differences, np.full(100, 10.0), seed=number, resamples=500)
        missed += not found.low <= 1 <= found.high
    assert 3 <= missed <= 22


def test_equal_models_are_equal():
    losses = np.linspace(0.1, 2.0, 6)
    found = mean_ratio([losses], [losses])
    assert (found.ratio, found.low, found.high, found.p_value) == (1.0, 1.0, 1.0, 1.0)
    assert math.isnan(mean_ratio([losses[:5]], [losses[:5]]).low)


def test_the_score_interval_has_a_width_where_nothing_differs():
    """The interval's ends are z^2 / (n + z^2) then."""
    for items in (1, 5, 1000):
        low, high = paired_difference(0, 0, items)
        assert high == pytest.approx(1.959964**2 / (items + 1.959964**2), rel=1e-6)
        assert low == pytest.approx(-high)
    low, high = paired_difference(5, 0, 5)
    assert 0 < low < 0.7
    assert high == pytest.approx(1.0)
    # Many items give the interval of a normal distribution.
    low, high = paired_difference(3000, 4000, 100_000)
    spread = 1.959964 * math.sqrt((0.07 - 0.01**2) / 100_000)
    assert (low, high) == (pytest.approx(-0.01 - spread, abs=1e-5), pytest.approx(-0.01 + spread, abs=1e-5))


def test_the_score_interval_covers_with_few_items():
    """20 items of which the models answer a tenth differently, each as often in its favour: no more than 1 in 20."""
    random = np.random.default_rng(2)
    missed = 0
    for _ in range(2000):
        won, lost, _same = random.multinomial(20, [0.05, 0.05, 0.9])
        low, high = paired_difference(int(won), int(lost), 20)
        missed += not low <= 0 <= high
    assert missed <= 2000 * 0.06


@pytest.mark.parametrize(
    ("items", "bound", "outcome"),
    [
        (5, "acc >= 0.98x", "inconclusive"),
        (300, "acc >= 0.98x", "inconclusive"),
        (1000, "acc >= 0.98x", "pass"),
        (5, "acc <= 1.02x", "inconclusive"),
    ],
)
@pytest.mark.parametrize("tasks", [1, 14])
def test_few_equal_answers_pass_no_relative_bound(items: int, bound: str, outcome: str, tasks: int):
    """Both have the same three fifths right."""
    names = [str(i) for i in range(items)]
    right = [float(i % 5 < 3) for i in range(items)]
    answers = [Answers(items=names, right=right, metric="acc")] * tasks
    [found] = answer_measures("t", {"dense": answers, "pruned": answers}, {})
    [judged] = judge([parse_bound(bound, "x")], [found])
    if tasks == 14 and items == 300:
        outcome = "pass"  # 4,200 items in all
    assert (judged.measured, judged.outcome) == (1.0, outcome)


def test_windows_that_are_too_few_to_judge_by():
    """Five of five are 1 % worse: that happens by chance once in 16 times."""
    counts = np.full(6, 10.0)
    before, after = np.full(6, 30.0), np.full(6, 30.1)
    assert math.isnan(perplexity_ratio(before[:5], after[:5], counts[:5]).low)
    assert perplexity_ratio(before, after, counts).low == pytest.approx(math.exp(0.01))


def test_one_item_has_no_interval():
    found = perplexity_ratio(np.array([1.0]), np.array([2.0]), np.array([4.0]))
    assert found.ratio == pytest.approx(math.exp(0.25))
    assert math.isnan(found.low)
    assert math.isnan(found.p_value)


def test_a_mean_of_tasks_counts_tasks_alike():
    big, small = np.zeros(1000), np.ones(10)
    found = mean_ratio([np.ones(1000), small], [big, small])
    assert found.ratio == pytest.approx(0.5)


def test_measures_of_answers():
    def answers(right: list[float]) -> Answers:
        return Answers(
            items=["a", "b", "c", "d"], right=right, metric="acc", normalized=right, gold_nll=[1.0, 2.0, 3.0, 4.0]
        )

    accuracy, normalized, nll = answer_measures(
        "task", {"dense": [answers([1, 1, 1, 0])], "pruned": [answers([1, 0, 0, 1])]}, {}
    )
    first, second = accuracy.results
    assert (accuracy.name, first.value, first.retention_percent) == ("acc(task)", 0.75, None)
    # lm-eval's own: sqrt(p (1 - p) / (n - 1)).
    assert first.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert second.retention_percent == pytest.approx(100 * 0.5 / 0.75)
    assert second.versus_first is not None
    assert (second.versus_first.test, second.versus_first.won, second.versus_first.lost) == ("McNemar, exact", 1, 2)
    assert second.versus_first.p_value == pytest.approx(1.0)
    assert (normalized.name, nll.name, nll.higher_is_better) == ("acc_norm(task)", "answer_nll(task)", False)
    assert nll.results[1].value == 2.5


def test_other_items_are_not_compared():
    one = Answers(items=["a"], right=[1.0], metric="acc")
    other = Answers(items=["b"], right=[1.0], metric="acc")
    [measure] = answer_measures("task", {"x": [one], "y": [other]}, {})
    assert measure.results[1].versus_first is None
    assert "not measured on the same items" in measure.notes[0]


def test_one_item_says_next_to_nothing_even_where_nothing_differs():
    found = mean_ratio([np.array([1.0])], [np.array([1.0])])
    assert found.ratio == 1
    assert found.low < 0.3
    assert found.high > 1.7
    assert math.isnan(found.p_value)


def test_nothing_right_is_nothing_kept():
    before = Answers(items=[str(number) for number in range(50)], right=[1.0] * 30 + [0.0] * 20, metric="acc")
    after = before.model_copy(update={"right": [0.0] * 50})
    [measure] = answer_measures("task", {"dense": [before], "pruned": [after]}, {})
    result = measure.results[1]
    assert result.versus_first is not None
    # A model with none of fifty right may still answer one of ten right.
    assert result.versus_first.low == 0.0
    assert result.versus_first.high == pytest.approx(0.23, abs=0.01)
    assert result.retention_percent == 0
    [bound] = judge([parse_bound("acc >= 0.97x", "--gate")], [measure])
    assert bound.outcome == "fail"


@pytest.mark.parametrize(("items", "outcome"), [(2, "inconclusive"), (30, "inconclusive"), (36, "pass")])
def test_all_right_passes_a_bound_only_with_enough_items(items: int, outcome: str):
    """0.9 ** 35 = 0.025: with fewer items, a model that is right nine times of ten is all right too often."""
    right = Answers(items=[str(number) for number in range(items)], right=[1.0] * items, metric="acc")
    [measure] = answer_measures("task", {"dense": [right], "pruned": [right]}, {})
    [bound] = judge([parse_bound("acc >= 0.9", "--gate")], [measure])
    assert bound.outcome == outcome


@pytest.mark.parametrize(("windows", "outcome"), [(2, "inconclusive"), (5, "inconclusive"), (6, "pass")])
def test_an_absolute_bound_takes_as_many_windows_as_a_relative_one(windows: int, outcome: str):
    rows = Likelihoods(sums=[30.0 + at / 10 for at in range(windows)], counts=[10] * windows, sha256="s", unit="window")
    measure = perplexity_measure("t", {"dense": rows, "pruned": rows}, {})
    [bound] = judge([parse_bound("ppl <= 30", "--gate")], [measure])
    assert (bound.outcome, bound.low is None) == (outcome, windows < 6)


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        # Shares of a right answer are no right answers: three of them say little, and 0.9 thrice no more.
        ([0.8, 0.9, 1.0], "inconclusive"),
        ([0.9, 0.9, 0.9], "inconclusive"),
        ([0.9] * 9, "inconclusive"),
        ([0.8, 0.9, 1.0] * 3, "pass"),
        # Right or wrong have an interval of their own, however few they are.
        ([1.0, 0.0, 0.0, 0.0], "fail"),
    ],
)
def test_absolute_bounds_on_scores_of_few_items(scores: list[float], outcome: str):
    answers = Answers(items=[str(number) for number in range(len(scores))], right=scores, metric="f1")
    [measure] = answer_measures("task", {"dense": [answers], "pruned": [answers]}, {})
    [bound] = judge([parse_bound("f1 >= 0.8", "--gate")], [measure])
    assert bound.outcome == outcome


def test_tasks_that_are_all_right_and_all_wrong_have_no_interval_together():
    right, wrong = (Answers(items=list("abcdefgh"), right=[share] * 8, metric="acc") for share in (1.0, 0.0))
    [measure] = answer_measures("mean", {"dense": [right, wrong], "pruned": [right, wrong]}, {})
    [bound] = judge([parse_bound("acc >= 0.5", "--gate")], [measure])
    assert (bound.measured, bound.outcome) == (0.5, "inconclusive")
