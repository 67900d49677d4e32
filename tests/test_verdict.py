from __future__ import annotations

from typing import Any

import pytest

from pat_serve.server.analysis.verdict import (
    MAX_DRIFT,
    MAX_NOISE,
    MAX_OTHER_CPU_SHARE,
    MIN_ROUNDS,
    Claim,
    Judgement,
    Surroundings,
    Verdict,
    judge,
    overall,
)

QUIET = Surroundings(other_cpu_share=0.0, settled=True)


def judged(low: float, high: float, margin: float = 0.0, **settings: Any) -> Judgement:
    """The judgement on a quiet machine, but for the settings."""
    chosen = {"rounds": 9, "spread": 0.02, "drift": 0.0, "surroundings": QUIET} | settings
    return judge(claim=Claim(ratio=1.33, margin=margin), low=low, high=high, **chosen)


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


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict", "strict"),
    [
        # 1.33 less 2 % is 1.3034.
        (1.326, 1.435, 0.02, PASS, INCONCLUSIVE),
        (1.304, 1.32, 0.02, PASS, FAIL),
        (1.34, 1.40, 0.02, PASS, PASS),
        (1.303, 1.34, 0.02, INCONCLUSIVE, INCONCLUSIVE),
        (1.29, 1.31, 0.02, INCONCLUSIVE, FAIL),
        (1.255, 1.290, 0.02, FAIL, FAIL),
        (1.255, 1.290, 0.06, PASS, FAIL),
        (1.326, 1.435, 0.0, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_a_margin_moves_the_threshold_and_the_strict_reading_stays_beside_it(
    low: float, high: float, margin: float, verdict: Verdict, strict: Verdict
) -> None:
    judgement = judged(low, high, margin)
    assert (judgement.verdict, judgement.strict) == (verdict, strict)
    assert ("strictly" in judgement.reason) is (margin > 0)
    if margin:
        assert f"{1.33 * (1 - margin):.3f}, {100 * margin:g}% under 1.33 (strictly: {strict.value})" in judgement.reason


def test_an_obstacle_stands_in_the_way_of_the_strict_reading_too() -> None:
    judgement = judged(2.0, 2.1, 0.02, rounds=MIN_ROUNDS - 1)
    assert (judgement.verdict, judgement.strict) == (INCONCLUSIVE, INCONCLUSIVE)


def test_a_claim_says_its_margin() -> None:
    assert str(Claim(ratio=1.33)) == "claim 1.33x, margin 2%"
    assert str(Claim(ratio=1.33, margin=0.0)) == str(Claim(ratio=1.33).strict) == "claim 1.33x"


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
        # This drift is as much faster as the first is slower.
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
