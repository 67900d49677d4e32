from __future__ import annotations

from typing import Any

import pytest

from pat_serve.server.analysis.verdict import (
    MAX_DRIFT,
    MAX_NOISE,
    MAX_OTHER_CPU_SHARE,
    MIN_ROUNDS,
    Judgement,
    Surroundings,
    Verdict,
    judge,
    overall,
)

QUIET = Surroundings(other_cpu_share=0.0, settled=True)


def judged(low: float, high: float, **settings: Any) -> Judgement:
    """On a quiet machine but for the settings."""
    chosen = {"rounds": 9, "spread": 0.02, "drift": 0.0, "surroundings": QUIET} | settings
    return judge(claim=1.33, low=low, high=high, **chosen)


PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.33, 1.40, PASS),
        (1.34, 1.34, PASS),
        (1.20, 1.32, FAIL),
        (1.20, 1.33, INCONCLUSIVE),
        (1.329, 1.331, INCONCLUSIVE),
    ],
)
def test_interval_against_claim(low: float, high: float, verdict: Verdict) -> None:
    judgement = judged(low, high)
    assert judgement.verdict is verdict
    assert "1.33" in judgement.reason


def test_too_few_rounds_and_too_much_noise_give_no_verdict() -> None:
    for low, high in ((2.0, 2.1), (1.0, 1.1)):
        few = judged(low, high, rounds=MIN_ROUNDS - 1)
        assert few.verdict is INCONCLUSIVE
        assert "4 rounds" in few.reason
        noisy = judged(low, high, rounds=50, spread=MAX_NOISE + 0.01)
        assert noisy.verdict is INCONCLUSIVE
        assert "not quiet" in noisy.reason
    assert judged(2.0, 2.1, rounds=MIN_ROUNDS, spread=MAX_NOISE).verdict is PASS


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"drift": MAX_DRIFT + 0.01}, "drifted by +51%"),
        # As much faster as that is slower.
        ({"drift": 1 / (1 + MAX_DRIFT) - 1 - 0.01}, "drifted by -34%"),
        (
            {"surroundings": Surroundings(other_cpu_share=MAX_OTHER_CPU_SHARE + 0.01, settled=True)},
            "took 51% of the CPU",
        ),
        ({"surroundings": Surroundings(other_cpu_share=0.0, settled=False)}, "did not settle"),
    ],
)
def test_a_disturbed_machine_gives_no_verdict(settings: dict[str, Any], told: str) -> None:
    for low, high in ((2.0, 2.1), (1.0, 1.1)):
        judgement = judged(low, high, **settings)
        assert judgement.verdict is INCONCLUSIVE
        assert told in judgement.reason


def test_what_pairs_bear_is_judged() -> None:
    surroundings = Surroundings(other_cpu_share=MAX_OTHER_CPU_SHARE, settled=True)
    for drift in (MAX_DRIFT, 1 / (1 + MAX_DRIFT) - 1 + 1e-9):
        assert judged(2.0, 2.1, drift=drift, surroundings=surroundings).verdict is PASS


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([PASS, PASS], PASS),
        ([PASS], PASS),
        ([PASS, FAIL], FAIL),
        ([FAIL, INCONCLUSIVE], FAIL),
        ([PASS, INCONCLUSIVE], INCONCLUSIVE),
        ([], INCONCLUSIVE),
    ],
)
def test_overall(verdicts: list[Verdict], expected: Verdict) -> None:
    assert overall(verdicts) is expected


def test_exit_codes() -> None:
    assert [verdict.exit_code for verdict in (PASS, FAIL, INCONCLUSIVE)] == [0, 1, 3]
