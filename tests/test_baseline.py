"""The dense parent beside the served model: what is refused before a start, and what a live check makes of tokens."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pat_serve.errors import EngineError, UsageError
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.speedup.conclusion import Beginning
from pat_serve.server.bench.speedup.result import Round, WarmUp
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine import baseline
from pat_serve.server.engine.baseline import available, check_comparable, check_memory
from pat_serve.server.engine.errors import BaselineMissing
from pat_serve.server.engine.workers.process_group import ProcessGroup
from pat_serve.server.http.errors import HttpError
from pat_serve.server.routes.live_speedup import Side, _judge, batch_trace
from pat_serve.server.routes.speedup_request import SpeedupRequest
from pat_serve.shapes.sizes import ModelSizes
from tests.tiny_models import tiny_config


def folder(path: Path, **overrides: Any) -> str:
    path.mkdir()
    tiny_config(**overrides).save_pretrained(path)
    return str(path)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    dense, pruned = folder(tmp_path / "dense"), folder(tmp_path / "pruned", hidden_size=32)
    check_comparable(pruned, dense)
    other = folder(tmp_path / "other", vocab_size=385)
    with pytest.raises(UsageError, match=r"--baseline .*vocabulary of 384.*385"):
        check_comparable(pruned, other)


def test_memory_of_both_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = folder(tmp_path / "dense"), folder(tmp_path / "pruned", hidden_size=32)
    gib = 2**30
    # A process for the scheduler and one for the model, twice, and two caches.
    monkeypatch.setattr(baseline, "available_memory_bytes", lambda: int(6.1 * gib))
    check_memory(pruned, dense, dtype="float32", kv_cache_bytes=gib)
    with pytest.raises(EngineError, match=r"about 6.2 GiB of memory for both.*6.1 GiB available"):
        check_memory(pruned, dense, dtype="float32", kv_cache_bytes=int(1.1 * gib))


def test_without_a_baseline_one_is_told_what_to_do() -> None:
    with pytest.raises(BaselineMissing, match="--baseline"):
        available(None)


def test_a_step_ends_with_its_slowest_request() -> None:
    trace = batch_trace(1.0, [[2.0, 2.5, 3.0], [2.25, 2.375, 4.0]], prompts_sha256="")
    assert trace.ttft_s == 1.25
    assert trace.decode_steps_s == (0.25, 1.5)


class FakeEngine:
    """Hands its tokens out in pieces, as an engine does whose reader was late."""

    def __init__(self, *pieces: int) -> None:
        self.pieces = pieces

    async def generate(self, prompt: Any, sampling: Any) -> AsyncIterator[SimpleNamespace]:
        for count in self.pieces:
            await asyncio.sleep(0.01)
            yield SimpleNamespace(token_ids=(7,) * count, engine_times=None)


def side(*pieces: int) -> Side:
    engine: Any = FakeEngine(*pieces)
    return Side(engine, ProcessGroup([]), start_s=0.0)


def test_tokens_that_come_together_are_spread_over_the_time_since_the_last() -> None:
    trace = asyncio.run(side(1, 1, 3).batch([[5]], 5))
    first, *spread = trace.decode_steps_s
    assert spread == pytest.approx([sum(spread) / 3] * 3)
    assert first > 0.009
    assert sum(spread) > 0.009


def test_a_batch_that_was_cut_short_is_no_measurement() -> None:
    with pytest.raises(HttpError, match="stopping"):
        asyncio.run(side(1, 1).batch([[5]], 3))


@pytest.mark.parametrize(("others", "verdict"), [(0, Verdict.PASS), (2, Verdict.INCONCLUSIVE)])
def test_a_users_request_makes_it_inconclusive(others: int, verdict: Verdict) -> None:
    dense, pruned = side(), side()
    for one in (dense, pruned):
        one.engine.model_name, one.engine.config, one.engine.dtype = "m", {}, "float32"
    shapes = tuple(ModelSizes.of(tiny_config(hidden_size=width).to_dict(), source="tiny") for width in (64, 32))
    slow, fast = (batch_trace(0.0, [[step * i for i in (1, 2, 3)]], prompts_sha256="") for step in (1.5, 1.0))
    pair = Round(
        first="baseline",
        prompts_sha256="",
        baseline=slow,
        candidate=fast,
        other_cpu_share=0.0,
        waiting_engine_cpu_share=0.0,
    )
    warm = WarmUp(traces=(slow, slow), stationary=True)
    settings = SpeedupSettings(rounds=5, output_tokens=3)
    begun = Beginning(date="", at_s=0.0)
    result = _judge(dense, pruned, (shapes[0], shapes[1]), settings, [warm, warm], [pair] * 5, others, begun=begun)
    assert result.verdict is verdict
    assert result.other_requests == others
    assert ("2 requests of users" in result.reason) is bool(others)
    assert [regime.ratio.median for regime in result.regimes] == [1.5, 1.5]


def test_request_takes_regimes_by_name() -> None:
    body = SpeedupRequest.model_validate_json(json.dumps({"regimes": ["prefill"], "output_tokens": 1}))
    assert body.regimes == ["prefill"]
    assert SpeedupRequest().regimes == ["prefill", "decode"]
    with pytest.raises(ValueError, match="at least 2"):
        SpeedupRequest(output_tokens=1)


def test_processes_are_counted_while_they_live_and_ended() -> None:
    spin = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    group = ProcessGroup([psutil.Process(child.pid)])
    used_s = group.cpu_s()
    assert used_s >= 0.15
    assert group.peak_memory_bytes() > 2**20
    assert group.age_s() > 0
    group.end()
    assert not psutil.pid_exists(child.pid)
    # Their time is not given back.
    assert group.cpu_s() == used_s
    child.stdout.close()
    child.poll()
