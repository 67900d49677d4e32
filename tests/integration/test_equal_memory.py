"""Two real servers with the same memory, loaded by the real guidellm. No assertion is about how fast they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pat_serve.server.bench.equal_memory.result import ROLES, EqualMemoryResult
from tests.integration.conftest import HANG_S, START_TIMEOUT_S
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_smaller_model_gets_the_larger_cache(tmp_path: Path) -> None:
    pytest.importorskip("guidellm")
    dense = save_tiny_llama(tmp_path / "dense", hidden_size=256, intermediate_size=2048, max_position_embeddings=1024)
    narrow = save_tiny_llama(tmp_path / "narrow", hidden_size=64, intermediate_size=128, max_position_embeddings=1024)
    out = tmp_path / "memory.json"
    command = [sys.executable, "-m", "pat_serve.cli.bench", "equal-memory", "--baseline", dense, "--candidate", narrow]
    command += ["--memory-gib", "0.05", "--prompt-tokens", "64", "--output-tokens", "8", "--rate", "4,8"]
    command += ["--seconds", "3", "--slo", "e2e=100", "--rounds", "5", "--dtype", "float32", "--out", out]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=2 * START_TIMEOUT_S + HANG_S, check=False
    )
    assert out.exists(), done.stderr
    result = EqualMemoryResult.model_validate_json(out.read_text())
    assert done.returncode == result.verdict.exit_code
    assert result.candidate.kv_cache_bytes > result.baseline.kv_cache_bytes > 0
    for role in ROLES:
        model = result.model(role)
        assert model.capacity.weight_bytes + model.kv_cache_bytes == result.memory_bytes
        assert model.peak_memory_bytes > 2**27
    assert [one.first for one in result.rounds] == ["baseline", "candidate"] * 2 + ["baseline"]
    for one in result.rounds:
        for role in ROLES:
            assert [run.rate for run in one.runs(role)] == [4.0, 8.0]
            assert all(run.completed and not run.errored for run in one.runs(role))
            # The bound is beyond all that a tiny model can take.
            assert all(run.good_share == 1.0 for run in one.runs(role))
