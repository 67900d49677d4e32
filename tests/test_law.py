"""The law of a held-out curve: found again on curves that are known, with intervals that cover, and told as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pat_serve.cli import eval as eval_command
from pat_serve.errors import DataError
from pat_serve.evaluation.law.curve import Curve, read_curve
from pat_serve.evaluation.law.fit import fit_law
from pat_serve.evaluation.law.report import law_of, lines
from tests.test_eval_command import run

TOKENS = np.arange(1, 17) * 1e5
FLOOR, SCALE, EXPONENT = 3.0, 1.5, 0.4


def losses(tokens: np.ndarray, floor: float = FLOOR, scale: float = SCALE, exponent: float = EXPONENT) -> np.ndarray:
    return floor + scale * (tokens / 1e5) ** -exponent


@pytest.mark.parametrize(("floor", "exponent"), [(3.0, 0.1), (3.0, 0.4), (2.0, 1.0), (0.5, 2.0), (0.0, 0.3)])
def test_a_known_law_is_found_again(floor: float, exponent: float):
    law = fit_law(TOKENS, losses(TOKENS, floor=floor, exponent=exponent))
    assert law.exponent == pytest.approx(exponent, rel=0.01)
    assert law.floor == pytest.approx(floor, abs=0.05)
    ahead = law.at(64e5)
    assert ahead.value == pytest.approx(losses(np.array([64e5]), floor=floor, exponent=exponent)[0], abs=0.003)
    assert law.residual < 1e-3


def test_tokens_for_a_loss_are_those_of_the_law():
    law = fit_law(TOKENS, losses(TOKENS))
    wanted = law.tokens_for(float(losses(np.array([50e5]))[0]))
    assert wanted.value == pytest.approx(50e5, rel=0.02)
    assert wanted.low <= wanted.value <= wanted.high
    assert math.isinf(law.tokens_for(FLOOR - 0.1).low)


def test_intervals_cover_as_often_as_they_say():
    """95 % of 400 curves, give or take three standard errors; an interval that forgot a parameter covers far fewer."""
    draw = np.random.default_rng(1)
    inside = {"floor": 0, "ahead": 0, "measured": 0}
    truth = float(losses(np.array([64e5]))[0])
    for _ in range(400):
        law = fit_law(TOKENS, losses(TOKENS) + draw.normal(0, 0.01, len(TOKENS)))
        floor, ahead, measured = law.at(math.inf), law.at(64e5), law.at(64e5, measured=True)
        inside["floor"] += floor.low <= FLOOR <= floor.high
        inside["ahead"] += ahead.low <= truth <= ahead.high
        inside["measured"] += measured.low <= truth + draw.normal(0, 0.01) <= measured.high
    for name, count in inside.items():
        assert 0.95 - 3 * 0.011 <= count / 400 <= 1.0, (name, count)
    # Not by being as wide as anything: a curve of this noise has a floor that is above 2 and below 4.
    assert floor.low > 2
    assert floor.high < 4
    # Tokens are told from the same band: an end of theirs is where an end of the loss's is reached.
    wanted = law.tokens_for(truth)
    assert law.at(wanted.low).low == pytest.approx(truth, abs=1e-6)
    assert law.at(wanted.high).high == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(
    ("target_nats", "outcome"),
    [
        (4.0, "reached"),
        (3.4, "reachable"),
        (2.0, "not reachable"),
        (3.0, "unclear"),
    ],
)
def test_a_target_is_judged_against_the_whole_interval(target_nats: float, outcome: str):
    noise = np.random.default_rng(2).normal(0, 0.004, len(TOKENS))
    curve = Curve(name="run", tokens=TOKENS, losses=losses(TOKENS) + noise, unit="tokens")
    law = law_of(curve, target=math.exp(target_nats))
    assert law.target is not None
    assert law.target.outcome == outcome
    told = "\n".join(lines(law))
    assert ("not reachable at this shape" in told) == (outcome == "not reachable")
    if outcome == "reached":
        assert law.target.tokens.value == TOKENS[np.flatnonzero(curve.losses <= 4.0)[0]]


def test_the_first_part_foretells_a_law_and_not_a_curve_that_leaves_it():
    noise = np.random.default_rng(3).normal(0, 0.002, len(TOKENS))
    steady = Curve(name="steady", tokens=TOKENS, losses=losses(TOKENS) + noise, unit="tokens")
    check = law_of(steady).foretold
    assert check is not None
    assert (check.points, check.until, check.at) == (8, 8e5, 16e5)
    assert check.inside
    assert check.unchanged > check.measured
    # A rate that falls to zero lets the loss drop beside the law.
    dropped = steady.losses - np.where(TOKENS > 8e5, 0.3 * (TOKENS / 8e5 - 1), 0)
    assert not law_of(Curve(name="decayed", tokens=TOKENS, losses=dropped, unit="tokens")).foretold.inside
    # Six evaluations are all needed for the law itself.
    assert law_of(steady.part(0, 6)).foretold is None


def test_a_curve_that_rises_is_flat_and_reaches_nothing():
    law = law_of(Curve(name="run", tokens=TOKENS, losses=3 + TOKENS / 1e7, unit="tokens"), target=math.exp(2.5))
    assert law.target is not None
    assert law.target.outcome in ("not reachable", "unclear")
    assert law.floor.value is not None
    assert law.floor.value > math.exp(2.9)


def write_metrics(path: Path, *, counted: bool) -> Path:
    rows: list[dict[str, float]] = [{"step": 0, "eval_loss": 9.0}]
    for step, loss in enumerate(losses(TOKENS), start=1):
        tokens = {"num_input_tokens_seen": float(step * 1e5)} if counted else {}
        rows += [{"step": step, "loss": 1.0, **tokens}, {"step": step, "eval_loss": float(loss), **tokens}]
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    return path


def test_the_command(tmp_path: Path, monkeypatch, capsys):
    folder = write_metrics(tmp_path / "run", counted=True)
    arguments = ["law", folder, folder / "metrics.jsonl", "--target-perplexity", math.exp(3.4)]
    assert run(monkeypatch, eval_command, *arguments, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["unit"] == "tokens"
    assert first["points"] == 16
    assert first["target"]["tokens"]["value"] == pytest.approx(1e5 * (1.5 / 0.4) ** 2.5, rel=0.02)
    assert second | {"run": ""} == first | {"run": ""}
    assert run(monkeypatch, eval_command, *arguments) == 0
    assert "perplexity 29.9641: 2.72 M tokens (95 %" in capsys.readouterr().out
    # A run of before counts steps, unless it is told how many tokens these have.
    older = write_metrics(tmp_path / "older", counted=False)
    assert read_curve(older).unit == "steps"
    assert read_curve(older, 1e5).tokens.tolist() == read_curve(folder).tokens.tolist()
    assert run(monkeypatch, eval_command, "law", older, "--skip", 11) == 2
    assert "at most 10" in capsys.readouterr().err


def test_a_run_without_evaluations_is_told(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(DataError, match="at least 6 evaluations"):
        read_curve(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_curve(tmp_path / "nowhere")
