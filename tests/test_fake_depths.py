"""Whole checks at two depths, on engines of known latency: from the settings to the verdict on the whole models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import EngineError
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.bench.report.rows import rows_of
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.bench.speedup.table import depth_lines
from pat_serve.server.engine import memory
from pat_serve.shapes.roofline import decode_ceiling
from tests.fake_models import Model, check, fake_models

# They measure real time, which a busy machine stretches.
pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    return fake_models(tmp_path, monkeypatch)


WHOLE = {"layers": 24, "prefill_s": 0.02, "step_s": 0.009}


def cut_pair(model: Model, *, ratio: float, **disturbance: Any) -> tuple[str, str]:
    """Twenty-four layers that are `ratio` times as fast, and fixed work that is not."""
    dense = model("dense", **WHOLE, prefill_layer_s=0.1, step_layer_s=0.009, **disturbance)
    narrow = model(
        "narrow", hidden_size=48, **WHOLE, prefill_layer_s=0.1 / ratio, step_layer_s=0.009 / ratio, **disturbance
    )
    return dense, narrow


def test_two_depths_give_the_verdict_for_the_whole_models(model: Model) -> None:
    """Neither depth shows it: fixed work hides the claim in a cut model, and the whole one meets it."""
    dense, narrow = cut_pair(model, ratio=1.36, noise=0.004)
    result = check(dense, narrow, rounds=12, depths=(2, 6), claim=1.33)
    truth = (0.009 + 24 * 0.009) / (0.009 + 24 * 0.009 / 1.36)
    decode = result.extrapolated[1]
    assert decode.ratio.median == pytest.approx(truth, rel=0.01)
    assert decode.ratio.low < truth < decode.ratio.high
    assert decode.baseline.fixed_s == pytest.approx(0.009, abs=0.001)
    assert decode.baseline.layer_s == pytest.approx(0.009, rel=0.03)
    assert (decode.layers, decode.layers_measured) == ("24", (2, 6))
    assert result.verdict is Verdict.PASS, result.reason
    # The verdict is on the whole; what was measured stands beside it, and shows less.
    assert [depth.layers for depth in result.depths] == [2, 6]
    assert [
        regime.verdict for depth in result.depths for regime in depth.regimes if regime.regime is Regime.DECODE
    ] == [
        Verdict.FAIL,
        Verdict.FAIL,
    ]
    assert result.baseline.shape.layers == 6
    assert result.settings.depths == (2, 6)
    # The ceiling is the whole models' too.
    shapes = [dataclasses.replace(one.shape, layers=24) for one in (result.baseline, result.candidate)]
    assert decode.ceiling == pytest.approx(
        decode_ceiling(shapes[0], shapes[1], batch_size=1, context_tokens=decode.context_tokens, dtype_bytes=4)
    )
    assert "24 layers (extrapolated)" in result.reason
    rows = [row for row in rows_of(result) if "extrapolated" in row.where and row.figure == "speed-up"]
    assert [row.value for row in rows] == [one.ratio.median for one in result.extrapolated]
    assert [line.split(":")[0] for line in depth_lines(result)] == [
        "depth   prefill, batch 1, from 2, 6 layers",
        "depth   decode, batch 1, from 2, 6 layers",
    ]
    read = SpeedupResult.model_validate_json(result.model_dump_json())
    assert read == result
    # The memory of the whole models is counted at their own depths, not at the measured ones.
    assert [one.weight_bytes for one in result.whole_capacities] == [4 * shape.parameters for shape in shapes]


def test_one_depth_is_what_it_was_and_noise_leaves_the_whole_undecided(model: Model) -> None:
    dense, narrow = cut_pair(model, ratio=1.36)
    one = check(dense, narrow, rounds=5, layers=2)
    assert (one.extrapolated, one.shallower, one.baseline.shape.layers) == ((), (), 2)
    assert one.regimes[1].verdict is Verdict.FAIL
    noisy = cut_pair(lambda name, **truth: model(f"noisy-{name}", **truth), ratio=1.36, noise=0.5)
    result = check(*noisy, rounds=6, depths=(2, 6))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.advice


def test_random_weights_that_do_not_fit_are_cut_to_two_depths_by_themselves(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, narrow = cut_pair(model, ratio=1.2)
    free = 0

    def room(layers: int) -> int:
        pair = [resolve(name, flag="--x", load_format="dummy", layers=layers, scratch=Path(dense).parent)
                for name in (dense, narrow)]  # fmt: skip
        return sum(
            memory.engine_memory_bytes(one.shape, SpeedupSettings(prompt_tokens=16).full_batches[0], "float32")
            for one in pair
        )

    free = room(4)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: free)
    result = check(dense, narrow, rounds=5, dtype="float32")
    assert result.settings.depths == (2, 4)
    assert [one.layers_measured for one in result.extrapolated] == [(2, 4), (2, 4)]
    free = room(24)
    assert check(dense, narrow, rounds=5, dtype="float32").settings.depths == ()
    free = room(2)
    with pytest.raises(EngineError, match="two engines side by side"):
        check(dense, narrow, rounds=5, dtype="float32")
