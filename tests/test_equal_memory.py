"""Equal memory: the share of each model, and the verdict from runs with a known truth."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import UsageError
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.equal_memory.result import (
    ROLES,
    EqualMemoryResult,
    EqualMemorySettings,
    MemoryModel,
    MemoryRound,
    conclude,
    ratio_of,
)
from pat_serve.server.bench.equal_memory.run import budget, check_settings, share
from pat_serve.server.bench.equal_memory.table import print_equal_memory
from pat_serve.server.bench.load.result import LoadRequest, LoadRun, load_run
from pat_serve.server.bench.model_source import ModelSource
from pat_serve.server.bench.planning.records import read_measured
from pat_serve.server.bench.planning.result import PlanSettings
from pat_serve.server.bench.planning.run import kv_tokens
from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.report.rows import rows_of
from pat_serve.shapes.sizes import ModelSizes
from tests.speedup_records import DENSE, MACHINE, NARROW, latency_result

SLO = {"ttft": 1.0}
SETTINGS = EqualMemorySettings(slo=SLO, claim=1.2, rates=(1.0, 2.0))


def source(shape: ModelSizes) -> ModelSource:
    return ModelSource(name="m", path="m", config={}, shape=shape, on_disk=True)


def a_run(good: int, bad: int, *, late_s: float = 0.0) -> LoadRun:
    """Ten seconds in which so many requests kept the bound, and so many did not."""
    requests = [
        LoadRequest(
            targeted_s=0.0, sent_s=late_s, first_token_s=late_s + (0.5 if index < good else 3.0),
            last_token_s=late_s + 4.0, output_tokens=8, outcome="completed",
        )
        for index in range(good + bad)
    ]  # fmt: skip
    return load_run(requests, name="poisson", rate=1.0, duration_s=10.0, slo=SLO)


def rounds(ratio: float, *, others: float = 0.0, late_s: float = 0.0, count: int = 8) -> list[MemoryRound]:
    draw = random.Random(3)
    made = []
    for index in range(count):
        factor = draw.lognormvariate(0, 0.01)
        made.append(
            MemoryRound(
                first="baseline" if index % 2 == 0 else "candidate",
                # The higher of two rates is past what the server keeps, so the lower one is the model's goodput.
                baseline=(a_run(round(1000 * factor), 0), a_run(200, 1500)),
                candidate=(a_run(round(1000 * factor * ratio), 0, late_s=late_s), a_run(200, 1500)),
                other_cpu_share=others,
            )
        )
    return made


@pytest.mark.parametrize(
    ("ratio", "disturbance", "verdict", "told"),
    [
        (1.4, {}, Verdict.PASS, "wholly at or above"),
        (1.0, {}, Verdict.FAIL, "wholly below"),
        (1.4, {"others": 0.7}, Verdict.INCONCLUSIVE, "other processes took"),
        (1.4, {"late_s": 1.0}, Verdict.INCONCLUSIVE, "the client was late in 8 runs"),
        # Within the margin of the claim, and below the claim itself.
        (1.185, {}, Verdict.PASS, "strictly: fail"),
    ],
)
def test_known_goodput_in_known_verdict_out(
    ratio: float, disturbance: dict[str, Any], verdict: Verdict, told: str
) -> None:
    judged = conclude(rounds(ratio, **disturbance), SETTINGS)
    assert judged.verdict is verdict, judged.reason
    assert told in judged.reason


def test_a_model_that_keeps_no_bound_has_no_ratio() -> None:
    found = rounds(1.4)
    none = found[0].model_copy(update={"baseline": (a_run(0, 10), a_run(0, 10))})
    judged = conclude([none, *found[1:]], SETTINGS)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert "rounds without a good request: baseline 1, candidate 0 of 8" in judged.reason
    assert ratio_of([0.0, 1.0], [1.0, 1.0], seed=0) is None


def test_the_smaller_weights_leave_room_for_requests() -> None:
    memory_bytes = budget(source(DENSE), SETTINGS, 2)
    dense, narrow = share(source(DENSE), memory_bytes, SETTINGS, 2), share(source(NARROW), memory_bytes, SETTINGS, 2)
    assert dense.requests == SETTINGS.requests
    saved = DENSE.weight_bytes(2) - NARROW.weight_bytes(2)
    # A width's cut leaves keys and values as they are.
    assert narrow.requests == SETTINGS.requests + saved // dense.kv_bytes_per_request
    given = SETTINGS.model_copy(update={"memory_gib": 0.5})
    with pytest.raises(UsageError, match=r"--memory-gib: expected room for the weights of m and a request of 512"):
        share(source(DENSE), budget(source(DENSE), given, 2), given, 2)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"slo": {}}, "--slo"),
        ({"slo": {"latency": 1.0}}, "--slo latency"),
        ({"claim": 0.0}, "--claim"),
        ({"margin": 0.6}, "--margin"),
        ({"memory_gib": 0.0}, "--memory-gib"),
        ({"requests": 0}, "--requests"),
        ({"rounds": 4}, "--rounds"),
        ({"rates": (0.0,)}, "--rate"),
        ({"seconds": 0.0}, "--seconds"),
        ({"rates": (2.0, 0.2), "seconds": 20.0}, "--seconds: expected 10 requests or more"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check_settings(SETTINGS.model_copy(update=change))


def made_result(name: str = "dense") -> EqualMemoryResult:
    found = rounds(1.4)
    memory_bytes = budget(source(DENSE), SETTINGS, 4)

    def model(shape: ModelSizes) -> MemoryModel:
        own = share(source(shape), memory_bytes, SETTINGS, 4)
        return MemoryModel(
            name=name, config_sha256="cd" * 32, shape=shape, capacity=own,
            kv_cache_bytes=memory_bytes - own.weight_bytes, ready_s=30.0, peak_memory_bytes=2**32,
        )  # fmt: skip

    judged = conclude(found, SETTINGS)
    sides = [[one.goodput_per_s(role) for one in found] for role in ROLES]
    return EqualMemoryResult(
        date="2026-11-30T01:00:00+00:00", duration_s=60.0, machine=MACHINE, guidellm="0.8.1", dtype="float32",
        settings=SETTINGS, memory_bytes=memory_bytes, baseline=model(DENSE), candidate=model(NARROW),
        rounds=tuple(found), goodput_ratio=ratio_of(sides[0], sides[1], seed=0), tokens_ratio=None,
        verdict=judged.verdict, strict_verdict=judged.strict, reason=judged.reason,
    )  # fmt: skip


def test_a_plan_takes_the_memory_and_a_report_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, grid = made_result(), latency_result("dense")
    (tmp_path / "memory.json").write_text(result.model_dump_json())
    (tmp_path / "grid.json").write_text(grid.model_dump_json())
    assert read_result(tmp_path / "memory.json") == result
    measured = read_measured([tmp_path / "grid.json", tmp_path / "memory.json"], role="baseline")
    settings = PlanSettings(slo={"ttft": 1.0}, rate=1.0)
    tokens = SETTINGS.requests * (SETTINGS.prompt_tokens + SETTINGS.output_tokens)
    assert kv_tokens(measured, settings) == tokens
    # A flag wins over the record.
    assert kv_tokens(measured, settings.model_copy(update={"memory_gib": 1000.0})) != tokens
    assert kv_tokens(measured, settings.model_copy(update={"kv_cache_gib": 1.0})) != tokens
    rows = {(row.model, row.figure): row for row in rows_of(result)}
    assert rows["dense / dense", "goodput ratio"].value == pytest.approx(1.4, rel=0.01)
    print_equal_memory(result)
    told = capsys.readouterr().out
    assert "good requests/s: 1.400 times the baseline's" in told
    assert "tokens/s: no ratio" in told
    assert "PASS" in told
