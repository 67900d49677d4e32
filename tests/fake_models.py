"""Models whose engines have a known latency, and checks of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pat_serve.server.bench.speedup.check import check_speedup
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers import process as worker_process
from pat_serve.server.engine.workers.cpu_watch import CpuWatch
from tests.tiny_models import tiny_config

Model = Callable[..., str]


def fake_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A maker of model folders for engines of known latency; every engine that starts from now on is one."""
    monkeypatch.setattr(worker_process, "WORKER", "tests.fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Their clock is made up: what others do on this machine meanwhile says nothing.
    monkeypatch.setattr(CpuWatch, "other_share", 0.0)

    def make(name: str, *, hidden_size: int = 64, layers: int = 2, **truth: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config(hidden_size=hidden_size, num_hidden_layers=layers).to_dict()
        told = {"prefill_s": 0.4, "step_s": 0.1, **truth}
        (folder / "config.json").write_text(json.dumps({**config, "fake": told}))
        (folder / "fake.json").write_text(json.dumps(told))
        return str(folder)

    return make


def quiet(*_: Any) -> None:
    """Show no progress at all in this test."""


def check(baseline: str, candidate: str, **settings: Any) -> SpeedupResult:
    chosen = SpeedupSettings.model_validate(
        {"load_format": "dummy", "prompt_tokens": 16, "roofline": False, **settings}
    )
    return check_speedup(baseline, candidate, chosen, progress=quiet)
