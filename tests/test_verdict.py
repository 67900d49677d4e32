import pytest

from pat_serve.server.analysis.verdict import MAX_NOISE, MIN_ROUNDS, Verdict, judge, overall

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
    judgement = judge(claim=1.33, low=low, high=high, rounds=9, noise=0.02)
    assert judgement.verdict is verdict
    assert "1.33" in judgement.reason


def test_too_few_rounds_and_too_much_noise_give_no_verdict() -> None:
    for low, high in ((2.0, 2.1), (1.0, 1.1)):
        few = judge(claim=1.33, low=low, high=high, rounds=MIN_ROUNDS - 1, noise=0.0)
        assert few.verdict is INCONCLUSIVE
        assert "4 rounds" in few.reason
        noisy = judge(claim=1.33, low=low, high=high, rounds=50, noise=MAX_NOISE + 0.01)
        assert noisy.verdict is INCONCLUSIVE
        assert "not quiet" in noisy.reason
    assert judge(claim=1.33, low=2.0, high=2.1, rounds=MIN_ROUNDS, noise=MAX_NOISE).verdict is PASS


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
