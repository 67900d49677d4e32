"""A training that is killed with SIGKILL, at whatever moment, and resumed equals one that was not, bit for bit.

Real processes, since an exception still runs `finally` blocks, closes files and flushes buffers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainings import Trainings

# 18 steps of 8 to an epoch, so that the end lies within an epoch; checkpoints lie between lines of metrics.jsonl.
SETTINGS = {
    "max-steps": 18, "batch-size": 4, "gradient-accumulation-steps": 2, "learning-rate": 2e-2, "max-grad-norm": 1.0,
    "dtype": "float32", "logging-steps": 2, "save-steps": 3, "keep-checkpoints": 2,
}  # fmt: skip
WALL_TIME = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def arguments(base: Path, rows: Path, run: Path) -> list[str]:
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    return ["--resume", "auto", "--model", str(base), "--data", str(rows), "--out", str(run), *flags]


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def logged(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in lines(run))


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kill") / "run"
    assert trainings.run(arguments(tiny_base, rows, run)) == 0, trainings.log.read_text()
    return run


@pytest.mark.parametrize("preset", ["default", pytest.param("paper", marks=pytest.mark.slow)])
def test_killed_again_and_again(
    preset: str, trainings: Trainings, uninterrupted: Path, tiny_base: Path, rows: Path, tmp_path: Path
):
    """By default the adapter starts from a calibration; under the paper's preset the mask moves between the kills."""
    run = tmp_path / "run"
    # Without operators the default trains the kept channels alone; the paper's mask and factors are D wide.
    method = ["--preset", preset, *(["--hio-rank", "8"] if preset == "paper" else [])]
    auto = arguments(tiny_base, rows, run) + method
    if preset == "paper":
        uninterrupted = tmp_path / "whole"
        whole = arguments(tiny_base, rows, uninterrupted) + method
        assert trainings.run(whole) == 0, trainings.log.read_text()
    staging = run / "checkpoints/.partial"

    trainings.kill_at(r"os.mkdir .*/\.partial/checkpoint-3 ", auto)
    assert logged(run, 2), "the first kill should come after a logged step"
    assert not steps(run), "the first kill should come before the first checkpoint"

    trainings.kill_at(r"open .*/\.partial/checkpoint-6/trainer_state.json w", auto)
    assert (staging / "checkpoint-6/optimizer.pt").exists(), "the second kill should come during a save"
    assert steps(run) == [3]
    assert complete(run / "checkpoints/step-3")

    trainings.kill_at(r"open .*/metrics.jsonl a", auto)
    assert not (run / "plan.json").exists()

    trainings.kill_at(r"os.rename .*/\.partial/checkpoint-12 .*/step-12", auto)
    assert logged(run, 12)
    assert steps(run) == [6, 9], "the fourth kill should come between a checkpoint and its name"

    trainings.kill_at(r"os.rename .*/step-9 .*/\.partial", auto)
    assert steps(run) == [9, 12, 15], "the fifth kill should come before the oldest checkpoint goes"

    trainings.kill_at(r"os.rename .*/plan\.json", auto)
    assert (run / "adapter").exists(), "the last kill should come between the adapter and the plan"
    assert not (run / "plan.json").exists()
    assert logged(run, 18)

    assert trainings.run(auto) == 0, trainings.log.read_text()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert curve(run) == curve(uninterrupted)
    assert steps(run) == steps(uninterrupted) == [15, 18]
    for name in (
        "plan.json", "plan.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
        "checkpoints/step-18/trained.safetensors", "checkpoints/step-18/losses.json",
    ):  # fmt: skip
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_auto_leaves_a_finished_run_alone(trainings: Trainings, uninterrupted: Path, tiny_base: Path, rows: Path):
    before = (uninterrupted / "plan.json").stat().st_mtime_ns
    assert trainings.run(arguments(tiny_base, rows, uninterrupted)) == 0
    assert "finished already" in trainings.log.read_text()
    assert (uninterrupted / "plan.json").stat().st_mtime_ns == before


def test_auto_refuses_other_settings(trainings: Trainings, uninterrupted: Path, tiny_base: Path, rows: Path):
    other = [*arguments(tiny_base, rows, uninterrupted), "--seed", "7"]
    assert trainings.run(other) == 2
    assert "seed 0" in trainings.log.read_text()


@pytest.mark.parametrize("flags", [["--force", "--out", "x"], []])
def test_auto_needs_out_alone(trainings: Trainings, flags: list[str]):
    assert trainings.run(["--resume", "auto", *flags]) == 2


def curve(run: Path) -> list[dict[str, float]]:
    """Every line, without what a clock says."""
    return [{name: value for name, value in line.items() if name not in WALL_TIME} for line in lines(run)]


def complete(checkpoint: Path) -> bool:
    wanted = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    return all((checkpoint / name).is_file() for name in (*wanted, "losses.json"))
