"""pat-bench plan, from recorded measurements to its answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pat_serve.cli.bench import app
from pat_serve.errors import PatServeError
from pat_serve.server.bench.latency.result import LatencyResult
from pat_serve.server.bench.planning.result import PlanResult
from pat_serve.server.bench.planning.steps import StepTimes
from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.report.rows import rows_of
from tests.speedup_records import latency_result, load_result, speedup_result, throughput_result
from tests.test_planning import cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = {
        "dense": latency_result("dense"),
        "pruned": latency_result("pruned", faster=1.3),
        "speedup": speedup_result(batch_sizes=(1, 4)),
        "throughput": throughput_result("dense"),
        "load": load_result("dense"),
    }
    elsewhere = records["pruned"].machine | {"cpu_cores": 64}
    records["elsewhere"] = records["pruned"].model_copy(update={"machine": elsewhere})
    records["other"] = records["dense"].model_copy(update={"config_sha256": "ef" * 32})
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(record.model_dump_json())
    return tmp_path


TRAFFIC = ("--rate", "5", "--prompt-tokens", "64", "--output-tokens", "9", "--requests", "500")


def plan(folder: Path, *arguments: str) -> Any:
    names = [str(folder / word) if word.endswith((".json", ".jsonl")) else word for word in arguments]
    return CliRunner().invoke(app, ["plan", *names])


def test_a_plan_of_dense_against_pruned(folder: Path) -> None:
    done = plan(
        folder, "--baseline", "dense.json", "--baseline", "throughput.json", "--candidate", "pruned.json", *TRAFFIC,
        "--slo", "ttft=1.5", "--slo", "tpot=0.6", "--price-per-hour", "2.5", "--out", "plan.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = read_result(folder / "plan.json")
    assert isinstance(result, PlanResult)
    assert result.schema_version == 1
    dense, pruned = result.models
    assert dense.replicas is not None
    assert pruned.replicas is not None
    assert pruned.capacity_per_s / dense.capacity_per_s == pytest.approx(1.3, rel=0.001)
    assert pruned.replicas < dense.replicas
    assert dense.cost_per_hour == 2.5 * dense.replicas
    assert dense.cost_per_million_tokens == pytest.approx(2.5 * dense.replicas / (5 * 9 * 3600) * 1e6)
    # The record's 8 in flight are beyond the grid's largest batch of 4.
    assert [check.concurrency for check in dense.checks] == [1, 2, 4]
    for word in ("machines", f"{pruned.replicas} instead of {dense.replicas}", "1.300x", "cost an hour"):
        assert word in done.output
    assert {row.figure for row in rows_of(result)} >= {"engines", "TTFT p90", "capacity of one"}
    # An engine over two machines: as many engines, twice the machines and the cost.
    wide = plan(
        folder, "--baseline", "dense.json", *TRAFFIC, "--slo", "ttft=1.5", "--slo", "tpot=0.6",
        "--price-per-hour", "2.5", "--devices-per-engine", "2", "--json",
    )  # fmt: skip
    [twice] = json.loads(wide.output)["models"]
    assert (twice["replicas"], twice["cost_per_hour"]) == (dense.replicas, 5.0 * dense.replicas)
    # The same once more, bit for bit; one speed-up record holds both models.
    again = plan(
        folder, "--baseline", "dense.json", "--candidate", "pruned.json", *TRAFFIC, "--slo", "ttft=1.5", "--slo",
        "tpot=0.6", "--json",
    )  # fmt: skip
    assert json.loads(again.output)["models"][1]["ttft"] == vars(pruned.ttft)
    both = plan(
        folder, "--baseline", "speedup.json", "--candidate", "speedup.json", "--prompt-tokens", "128",
        "--output-tokens", "5", "--slo", "ttft=1.5", "--requests", "200",
    )  # fmt: skip
    assert both.exit_code == 0, both.output
    assert "llama2-7b-pat25" in both.output


def test_exit_codes_of_plans_that_do_not_come_out(folder: Path) -> None:
    impossible = plan(folder, "--baseline", "dense.json", *TRAFFIC, "--slo", "ttft=0.1")
    assert (impossible.exit_code, "no number of engines" in impossible.output) == (1, True)
    beyond = plan(folder, "--baseline", "dense.json", *TRAFFIC, "--slo", "ttft=1.5", "--max-replicas", "2")
    assert (beyond.exit_code, "too few" in beyond.output) == (3, True)


def test_a_grid_from_a_disturbed_machine_is_not_relied_on(folder: Path) -> None:
    """Four requests' step in much less time than one's: the machine had something else to do during the one."""
    record = LatencyResult.model_validate_json((folder / "dense.json").read_text())
    first, second = record.cells
    slow = [
        replace(
            trace,
            steps_ended_s=tuple(
                trace.steps_started_s[0] + 3 * (end_s - trace.steps_started_s[0]) for end_s in trace.steps_ended_s
            ),
            steps_started_s=tuple(
                trace.steps_started_s[0] + 3 * (begun_s - trace.steps_started_s[0]) for begun_s in trace.steps_started_s
            ),
        )
        for trace in first.traces
    ]
    disturbed = record.model_copy(update={"cells": (first.model_copy(update={"traces": tuple(slow)}), second)})
    (folder / "dense.json").write_text(disturbed.model_dump_json())
    done = plan(folder, "--baseline", "dense.json", *TRAFFIC, "--slo", "ttft=20")
    assert done.exit_code == 3, done.output
    assert "a decode step of 1 at context 68.5 took" in done.output
    assert "measure again" in done.output
    assert not StepTimes(cells(batches=(1, 2, 4), prompts=(100, 300)), name="made-up").doubts()


def test_memory_bounds_what_runs_at_once_and_lengths_come_from_a_file(folder: Path) -> None:
    rows = [{"prompt_tokens": 64, "output_tokens": 9}, {"prompt_tokens": 64, "output_tokens": 2, "user": "x"}]
    (folder / "lengths.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    record = LatencyResult.model_validate_json((folder / "dense.json").read_text())
    kv_bytes = 4 * record.shape.kv_values_per_token
    gib = (record.shape.weight_bytes(4) + 150 * kv_bytes) / 2**30
    common = ("--baseline", "dense.json", "--lengths", "lengths.jsonl", "--rate", "1", "--requests", "300")
    wide = plan(folder, *common, "--slo", "ttft=9", "--json")
    tight = plan(folder, *common, "--slo", "ttft=9", "--memory-gib", repr(gib), "--json")
    models = [json.loads(one.output)["models"][0] for one in (wide, tight)]
    assert [model["kv_tokens"] for model in models] == [None, 150]
    assert models[1]["capacity_per_s"] < models[0]["capacity_per_s"]
    added = plan(folder, *common, "--slo", "ttft=9", "--overhead", "0.25", "--json")
    delta_s = json.loads(added.output)["models"][0]["ttft"]["p50"] - models[0]["ttft"]["p50"]
    assert delta_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("cut", "kv_share"),
    [
        ({"hidden": 3072}, 1.0),
        ({"layers": 24}, 24 / 32),
        ({"kv_heads": 24, "heads": 24, "ffn": 8192}, 24 / 32),
        ({"layers": 28, "kv_heads": 28, "heads": 28}, 28 / 32 * 28 / 32),
    ],
    ids=str,
)
def test_a_cut_of_layers_or_groups_holds_more_tokens_in_equal_memory(
    cut: dict[str, int], kv_share: float, folder: Path
) -> None:
    record = LatencyResult.model_validate_json((folder / "dense.json").read_text())
    dense = replace(record.shape, layers=32)
    smaller = replace(dense, **cut)
    (folder / "dense.json").write_text(record.model_copy(update={"shape": dense}).model_dump_json())
    (folder / "cut.json").write_text(record.model_copy(update={"shape": smaller}).model_dump_json())
    # Room for the dense weights and two of its requests of 73 tokens.
    memory_bytes = dense.weight_bytes(4) + 4 * 2 * 73 * dense.kv_values_per_token
    done = plan(
        folder, "--baseline", "dense.json", "--candidate", "cut.json", *TRAFFIC, "--slo", "ttft=20", "--json",
        "--memory-gib", repr(memory_bytes / 2**30),
    )  # fmt: skip
    models = json.loads(done.output)["models"]
    assert models[0]["kv_tokens"] == 146
    token_bytes = 4 * 2 * 32 * 32 * 128 * kv_share
    assert models[1]["kv_tokens"] == int((memory_bytes - 4 * smaller.parameters) / token_bytes)
    # Both run at the same pace here: more requests in flight are all that the cut one gains.
    assert models[1]["capacity_per_s"] > models[0]["capacity_per_s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--baseline", "dense.json", "--slo", "ttft=1", "--prompt-tokens", "65"), "64 to 64, the prompts that"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--output-tokens", "10"), "contexts up to 73"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--max-batch", "8"), "--max-batch"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--memory-gib", "1"), "--memory-gib"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--memory-gib", "9", "--kv-cache-gib", "1"), "Leave one out"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--kv-cache-gib", "1e-4"), "--kv-cache-gib"),
        (("--baseline", "dense.json"), "--slo"),
        (("--baseline", "dense.json", "--slo", "speed=1"), "--slo speed"),
        (("--baseline", "dense.json", "--slo", "ttft=fast"), "--slo"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--rate", "0"), "--rate"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--percentile", "100"), "--percentile"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--requests", "5"), "--requests"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--prompt-tokens", "64:-1"), "--prompt-tokens"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--dispatch", "random"), "--dispatch"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--lengths", "none.jsonl"), "--lengths"),
        (("--baseline", "dense.json", "--slo", "ttft=1", "--lengths", "dense.json"), "line 1"),
        (("--baseline", "load.json", "--slo", "ttft=1"), "pat-bench load"),
        (("--baseline", "throughput.json", "--slo", "ttft=1"), "throughput alone"),
        (("--baseline", "none.json", "--slo", "ttft=1"), "no such file"),
        (("--baseline", "dense.json", "--baseline", "other.json", "--slo", "ttft=1"), "another config.json"),
        (("--baseline", "dense.json", "--candidate", "elsewhere.json", "--slo", "ttft=1"), "cpu_cores 2"),
    ],
)
def test_wrong_usage_names_what_is_wrong(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    given = list(arguments)
    for flag, value in (("--prompt-tokens", "64"), ("--output-tokens", "9")):
        given += [] if flag in given else [flag, value]
    error = plan(folder, *given).exception
    assert isinstance(error, PatServeError), error
    assert error.exit_code == 2
    assert message in str(error)
