"""A claim over a grid of batches and prompts: each regime has its own rounds and ceiling, and the named ones decide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import UsageError
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.planning.records import read_measured
from pat_serve.server.bench.report.charts import reached_chart
from pat_serve.server.bench.speedup.analysis import conclude, rounds_of
from pat_serve.server.bench.speedup.checks import check_settings
from pat_serve.server.bench.speedup.grid import Cell, Named, Regime, parse_grid, parse_named
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.bench.speedup.table import claim_line, print_result
from pat_serve.server.routes.speedup_request import SpeedupRequest
from tests.fake_models import check, fake_models
from tests.speedup_records import pair, rounds, speedup_result

SMALL, WIDE = Cell(batch_size=8, prompt_tokens=128), Cell(batch_size=8, prompt_tokens=1024)


def test_a_grid_is_read_from_a_flag() -> None:
    assert parse_grid("8x128, 8x1024,8x128", "--grid") == (SMALL, WIDE)
    assert [str(one) for one in parse_named("8x128:decode,8x1024", "--claim-at")] == ["8x128:decode", "8x1024"]
    for text in ("", "8", "8x", "0x128", "8x0", "x8", "8x-1", "8x128x2", "8x1e3"):
        with pytest.raises(UsageError, match="requests x prompt tokens"):
            parse_grid(text, "--grid")
    with pytest.raises(UsageError, match="prefill or decode after a colon"):
        parse_named("8x128:both", "--claim-at")


def test_cells_of_one_batch_are_told_apart_by_their_prompts() -> None:
    """The same batch at two prompts: each is judged by its own rounds, against its own ceiling."""
    both = pair(claim=1.3, grid=(SMALL, WIDE))
    fast, slow = rounds(12, ratio=1.5, cells=(SMALL,)), rounds(12, ratio=1.1, cells=(WIDE,), seed=1)
    mixed = [one for pairs in zip(fast, slow, strict=True) for one in pairs]
    assert rounds_of(mixed, WIDE) == slow
    found = {one.name: one for one in both.analyse(mixed)}
    assert list(found) == ["prefill, 8x128", "decode, 8x128", "prefill, 8x1024", "decode, 8x1024"]
    assert found["decode, 8x128"].ratio.median == pytest.approx(1.5, rel=0.03)
    assert found["decode, 8x1024"].ratio.median == pytest.approx(1.1, rel=0.03)
    assert [one.verdict for one in found.values()] == [Verdict.PASS, Verdict.PASS, Verdict.FAIL, Verdict.FAIL]
    # The KV cache does not shrink with the width, so a longer context has a lower ceiling.
    assert found["decode, 8x1024"].ceiling < found["decode, 8x128"].ceiling
    [alone] = pair(claim=1.3, batch_size=8, prompt_tokens=1024, regimes=("decode",)).analyse(slow)
    assert (alone.ceiling, alone.ratio) == (found["decode, 8x1024"].ceiling, found["decode, 8x1024"].ratio)
    assert both.average(tuple(found.values())) is None


@pytest.mark.parametrize(
    ("named", "verdict"),
    [
        ((), Verdict.FAIL),
        ((Named(cell=SMALL),), Verdict.PASS),
        ((Named(cell=SMALL), Named(cell=WIDE, regime=Regime.DECODE)), Verdict.FAIL),
    ],
)
def test_the_regimes_that_a_claim_names_decide(named: tuple[Named, ...], verdict: Verdict) -> None:
    both = pair(claim=1.3, grid=(SMALL, WIDE), named=named)
    measured = rounds(12, ratio=1.5, cells=(SMALL,)) + rounds(12, ratio=1.1, cells=(WIDE,), seed=1)
    regimes = both.analyse(measured)
    assert len(regimes) == 4  # all are shown
    judged = conclude(regimes, measured, both.settings.claimed)
    assert judged.verdict is verdict
    assert ("8x1024" in judged.reason) == (verdict is Verdict.FAIL)
    assert len(both.judged(measured)) == sum(one.claimed for one in regimes)


def test_a_grid_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    named = (Named(cell=WIDE, regime=Regime.DECODE),)
    result = speedup_result(ratio=1.4, grid=(SMALL, WIDE), named=named)
    assert claim_line(result) == "claim 1.33x, margin 2% at 8x1024:decode"
    print_result(result)
    told = capsys.readouterr().out
    assert told.count("8x1024") >= 2
    assert "do not count" in told
    assert told.count("(") - told.count("(extrapolated") >= 3  # three verdicts in brackets
    chart = reached_chart(result)
    assert [bar.name for bar in chart.data] == ["prefill", "decode"]
    for bar, regime in zip(chart.data, Regime, strict=True):
        own = [one for one in result.regimes if one.regime is regime]
        assert list(bar.x) == ["8x128", "8x1024"]
        assert list(bar.y) == [one.ratio.median / one.ceiling for one in own]
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_engines_hold_every_cell_and_no_more() -> None:
    settings = SpeedupSettings(grid=(Cell(batch_size=64, prompt_tokens=16), Cell(batch_size=1, prompt_tokens=4096)))
    assert settings.largest_batch == 64
    assert settings.tokens_per_request == 4096 + 9
    assert [one.requests * one.tokens_per_request for one in settings.full_batches] == [64 * 25, 4105]
    assert max(one.step_tokens for one in settings.full_batches) == 4096


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"named": (Named(cell=Cell(batch_size=2, prompt_tokens=8)),)}, "--claim-at"),
        ({"named": (Named(cell=SMALL, regime=Regime.DECODE),), "regimes": ("prefill",)}, "--claim-at"),
        ({"grid": (Cell(batch_size=32, prompt_tokens=1024),), "output_tokens": 3}, "32 prompts of 1024 tokens"),
        ({"grid": (Cell(batch_size=99999, prompt_tokens=1),)}, "--grid"),
        ({"grid": (SMALL, WIDE), "fixed_memory": True}, "--fixed-memory"),
    ],
)
def test_grids_that_make_no_sense(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check_settings(SpeedupSettings.model_validate({"grid": (SMALL, WIDE), **change}))


def test_a_request_to_the_server() -> None:
    cells = [{"batch_size": 8, "prompt_tokens": 128}, {"batch_size": 8, "prompt_tokens": 1024}]
    body = SpeedupRequest.model_validate({"grid": cells, "claim_at": [{**cells[1], "regime": "decode"}]})
    assert tuple(one.cell for one in body.grid) == (SMALL, WIDE)
    for wrong in (
        {"grid": [*cells, cells[0]]},
        {"grid": cells, "claim_at": [{"batch_size": 1, "prompt_tokens": 128}]},
        {"grid": cells, "regimes": ["prefill"], "claim_at": [{**cells[0], "regime": "decode"}]},
    ):
        with pytest.raises(ValueError, match=r"grid must not hold|claim_at names"):
            SpeedupRequest.model_validate(wrong)


def test_the_old_average_stays_for_batches_of_one_prompt() -> None:
    both = pair(claim=1.3, batch_sizes=(1, 4), regimes=("prefill",))
    average = both.average(both.analyse(rounds(12, ratio=1.4, batch_sizes=(1, 4))))
    assert average is not None
    assert math.isclose(average.median, 1.4, rel_tol=0.03)


def test_a_grid_at_two_depths_starts_two_pairs_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of known latency, in processes of their own: each cell is measured and extrapolated at every depth."""
    model = fake_models(tmp_path, monkeypatch)
    dense = model("dense", layers=8)
    narrow = model("narrow", layers=8, hidden_size=48, prefill_s=0.4 / 1.4, step_s=0.1 / 1.4)
    cells = (Cell(batch_size=8, prompt_tokens=16), Cell(batch_size=8, prompt_tokens=128))
    result = check(dense, narrow, grid=cells, depths=(2, 6), rounds=5, output_tokens=4)
    assert [depth.layers for depth in result.depths] == [2, 6]
    for depth in result.depths:
        # A round has a turn for each cell, in an order that is reversed from round to round.
        prompts = [one.baseline.prompt_tokens for one in depth.rounds]
        assert prompts == [16, 128, 128, 16] * 2 + [16, 128]
    assert [(one.name, one.batches) for one in result.extrapolated] == [
        (f"{phase}, {cell}, 8 layers (extrapolated)", str(cell)) for cell in cells for phase in Regime
    ]


def test_a_grid_is_read_back_by_a_plan(tmp_path: Path) -> None:
    """The same batch at two prompts gives two cells of step times."""
    result = speedup_result(ratio=1.4, grid=(SMALL, WIDE))
    (tmp_path / "grid.json").write_text(result.model_dump_json())
    found = read_measured([tmp_path / "grid.json"], role="candidate")
    assert [(one.batch_size, one.prompt_tokens) for one in found.cells] == [(8, 128), (8, 1024)]
