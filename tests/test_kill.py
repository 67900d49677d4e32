"""A training that is killed with SIGKILL, at whatever moment, and resumed equals one that was not, bit for bit.

Real processes, since an exception still runs `finally` blocks, closes files and flushes buffers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# 18 steps of 8 to an epoch, so that the end lies within an epoch; checkpoints lie between lines of metrics.jsonl.
SETTINGS = {
    "max-steps": 18, "batch-size": 4, "gradient-accumulation-steps": 2, "learning-rate": 2e-2, "max-grad-norm": 1.0,
    "hio-rank": 8, "dtype": "float32", "logging-steps": 2, "save-steps": 3, "keep-checkpoints": 2,
}  # fmt: skip
WALL_TIME = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


# Forks itself for every line of arguments: ten seconds of imports are paid once, and each training is a process.
FORK_SERVER = """
import json, os, sys
import accelerate, datasets, peft, torch, torch.utils.tensorboard, transformers
import pat_serve.training.run, pat_serve.training.callbacks, pat_serve.training.insert, pat_serve.training.trainer
from pat_serve.cli.train import main
print("ready", flush=True)
for line in sys.stdin:
    arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["pat-train", *arguments]
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Trainings:
    """Starts pat-train as a process of its own, again and again."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def _start(self, arguments: list[str]) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([arguments, str(self.log)]) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def run(self, arguments: list[str]) -> int:
        """Train to the end; the exit code."""
        self._start(arguments)
        return int(self._answer())

    def kill_when(self, moment: Callable[[], bool], arguments: list[str]) -> None:
        """Train until a moment comes, then SIGKILL; it must not have ended by itself before."""
        pid = self._start(arguments)
        deadline = time.monotonic() + 120
        while not moment():
            assert Path(f"/proc/{pid}").exists(), self.log.read_text()
            assert time.monotonic() < deadline
        os.kill(pid, signal.SIGKILL)
        assert int(self._answer()) == -signal.SIGKILL

    def close(self) -> None:
        """End the server."""
        self.server.communicate()


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
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    server = Trainings(tmp_path_factory.mktemp("log") / "stderr")
    yield server
    server.close()


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kill") / "run"
    assert trainings.run(arguments(tiny_base, rows, run)) == 0, trainings.log.read_text()
    return run


def test_killed_again_and_again(trainings: Trainings, uninterrupted: Path, tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    auto = arguments(tiny_base, rows, run)
    staging = run / "checkpoints/.partial"

    trainings.kill_when(lambda: logged(run, 1), auto)
    assert not steps(run), "the first kill should come before the first checkpoint"

    trainings.kill_when(lambda: steps(run) == [3] and staging.exists() and any(staging.iterdir()), auto)
    assert staging.exists(), "the second kill should come during a save"
    assert all(complete(run / f"checkpoints/step-{step}") for step in steps(run))

    trainings.kill_when(lambda: logged(run, 10), auto)
    assert not (run / "plan.json").exists()

    trainings.kill_when(lambda: (run / "adapter").exists(), auto)
    assert not (run / "plan.json").exists(), "the last kill should come between the adapter and the plan"
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
