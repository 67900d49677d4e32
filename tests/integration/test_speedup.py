"""Real engines on tiny shapes. No assertion is about how fast they are."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pat_serve.errors import EngineError
from pat_serve.server.analysis.trace import prompts_digest
from pat_serve.server.bench.speedup.check import check_speedup
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.bench.speedup.rounds import round_prompts
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from tests.integration.conftest import HANG_S, START_TIMEOUT_S
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.vllm

_MARK = "PAT_TEST_MARK"


def shape_folder(folder: Path, **overrides: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(**overrides).to_dict()))
    return folder


@pytest.fixture
def mark() -> Iterator[str]:
    """A value in the environment of all processes that a test starts, which must be gone when it ends."""
    value = uuid.uuid4().hex
    os.environ[_MARK] = value
    yield value
    del os.environ[_MARK]
    left = processes(value)
    for process in left:
        process.kill()
    assert not left


def processes(mark: str) -> list[psutil.Process]:
    """Processes other than this one that carry the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def bench(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pat_serve.cli.bench", "speedup", "--load-format", "dummy", *map(str, arguments)]


def test_a_model_against_itself(tmp_path: Path, mark: str) -> None:
    folder, out = shape_folder(tmp_path / "model"), tmp_path / "result.json"
    flags = ("--batch-size", 3, "--prompt-tokens", 40, "--output-tokens", 6, "--rounds", 6, "--seed", 7)
    command = bench("--baseline", folder, "--candidate", folder, *flags, "--layers", 1, "--json", "--out", out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)

    result = SpeedupResult.model_validate_json(done.stdout)
    assert done.stderr == ""
    assert out.read_text() == done.stdout
    assert result.verdict.value != "pass"
    assert done.returncode == result.verdict.exit_code
    assert [regime.regime for regime in result.regimes] == [Regime.PREFILL, Regime.DECODE]
    assert result.baseline.shape == result.candidate.shape
    assert result.baseline.shape.layers == 1
    assert result.baseline.config_sha256 == result.candidate.config_sha256
    for regime in result.regimes:
        assert regime.ceiling == 1.0
        assert regime.ratio.low <= regime.ratio.median <= regime.ratio.high
        assert len(regime.ratio.ratios) == regime.baseline.count == regime.candidate.count == 6
        assert regime.context_tokens == (40 if regime.regime is Regime.PREFILL else 43)

    assert [pair.first for pair in result.rounds] == ["baseline", "candidate"] * 3
    digests = [pair.prompts_sha256 for pair in result.rounds]
    # The engines saw the ids that were drawn, both the same ones, and new ones in each round.
    assert digests == [prompts_digest(round_prompts(result.settings, 384, index)) for index in range(6)]
    for pair in result.rounds:
        for trace in (pair.baseline, pair.candidate):
            assert trace.prompts_sha256 == pair.prompts_sha256
            assert trace.steps_tokens == (3,) * 6
            assert len(trace.decode_steps_s) == 5
    # Only one engine works at a time: in no pair do two steps overlap.
    for pair in result.rounds:
        steps = sorted(
            step
            for trace in (pair.baseline, pair.candidate)
            for step in zip(trace.steps_started_s, trace.steps_ended_s, strict=True)
        )
        assert all(ended_s <= started_s for (_, ended_s), (started_s, _) in itertools.pairwise(steps))


@pytest.mark.slow
def test_an_engine_that_dies_midway(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense, narrow = shape_folder(tmp_path / "dense"), shape_folder(tmp_path / "narrow", hidden_size=48)
    settings = SpeedupSettings(load_format="dummy", rounds=5, prompt_tokens=16, regimes=(Regime.PREFILL,))
    stages = []

    def kill_one(stage: str, done: int, total: int) -> None:
        stages.append((stage, done, total))
        if (stage, done) == ("measuring rounds", 2):
            workers = processes(mark)
            assert len(workers) == 2
            workers[1].kill()

    with pytest.raises(EngineError, match="ended with signal SIGKILL") as caught:
        check_speedup(str(dense), str(narrow), settings, progress=kill_one)
    assert stages == [
        ("starting two engines", 0, 5),
        ("probing the machine", 0, 5),
        ("warming up", 0, 5),
        *[("measuring rounds", done, 5) for done in range(3)],
    ]
    [log] = {path for path in tmp_path.rglob("*.log") if str(path) in caught.value.fix}
    assert "vLLM" in log.read_text() or "vllm" in log.read_text()


@pytest.mark.slow
def test_decode_alone_reads_each_prompt_from_the_cache(tmp_path: Path) -> None:
    folder = shape_folder(tmp_path / "model")
    flags = ("--batch-size", 2, "--prompt-tokens", 200, "--output-tokens", 6, "--rounds", 6, "--regime", "decode")
    command = bench("--baseline", folder, "--candidate", folder, *flags, "--layers", 1, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    result = SpeedupResult.model_validate_json(done.stdout)
    assert [regime.regime for regime in result.regimes] == [Regime.DECODE]
    assert {pair.prompts_sha256 for pair in result.rounds} == {prompts_digest(round_prompts(result.settings, 384, 0))}
    # A cached prompt gives the same tokens in the same steps.
    assert {trace.steps_tokens for pair in result.rounds for trace in (pair.baseline, pair.candidate)} == {(2,) * 6}


def test_an_engine_that_does_not_start(tmp_path: Path, mark: str) -> None:
    folder = shape_folder(tmp_path / "model", architectures=["NoSuchForCausalLM"])
    command = bench("--baseline", folder, "--candidate", folder)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False, env=environment
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "expected an engine that starts and runs" in done.stderr
    assert "NoSuchForCausalLM" in done.stderr.splitlines()[0]
    logs = list(tmp_path.rglob("*.log"))
    assert any(str(log) in done.stderr for log in logs)


# Both signals that can be caught take the same way.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_no_process_outlives_a_signal(number: signal.Signals, tmp_path: Path, mark: str) -> None:
    folder = shape_folder(tmp_path / "model")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = subprocess.Popen(
        bench("--baseline", folder, "--candidate", folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell without job control has what it runs in the background ignore SIGINT, and these tests may be that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while len(processes(mark)) < 3:
        assert time.monotonic() < deadline_s
        assert command.poll() is None
        time.sleep(0.2)
    workers = [process for process in processes(mark) if process.pid != command.pid]
    command.send_signal(number)
    _, stderr = command.communicate(timeout=HANG_S)
    assert command.returncode != 0
    # A parent that was killed cannot end its workers: they notice that their pipe is closed.
    _, alive = psutil.wait_procs(workers, timeout=HANG_S)
    assert not alive
    if number is not signal.SIGKILL:
        assert "Traceback" not in stderr
        assert not list(tmp_path.glob("pat-bench-*"))
