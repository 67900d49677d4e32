"""Settings for the whole test run, and a tiny base, data set and finished run that several tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from tests.tiny_models import save_tiny_llama
from tests.trainings import Trainings
from tests.work_order import FilesTogether, longest_first

# Matrices of 64 x 64 gain nothing from a second thread, and spinning threads of several processes stall each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their length: an archive holds the second of its writing, and xdist's workers compare names."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) and len(val) > 8 else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


WORDS = ["list", "dict", "value", "file", "path", "name", "key", "return"]


def write_rows(path: Path, rows: int = 64) -> Path:
    """Alpaca rows with a pattern that a tiny model can learn."""
    with path.open("w") as file:
        for number in range(rows):
            first, second = WORDS[number % 8], WORDS[(number // 8) % 8]
            row = {"instruction": f"Join {first} and {second}", "output": f"{first} {second} {first}"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models that are read from GGUF go, of this process and all that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PAT_SERVE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def finished_run(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PAT run of 24 steps; large learning rates, so that every trained tensor is far from where it started."""
    from pat_serve.training.run import start

    run = tmp_path_factory.mktemp("runs") / "pat"
    start(tiny_recipe(tiny_base, rows), run)
    return run


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """Start real pat-train processes in the tests."""
    server = Trainings(tmp_path_factory.mktemp("trainings") / "stderr")
    yield server
    server.close()


def tiny_recipe(base: Path, rows: Path, **overrides: object):
    """PAT as published unless a test says otherwise: its mask is the part with a state of its own."""
    from pat_serve.training.config import TrainRecipe
    from pat_serve.training.presets import PAPER

    settings: dict[str, object] = {
        **PAPER,
        "model": str(base),
        "data": str(rows),
        "max_steps": 24,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "max_grad_norm": 1.0,
        "lora_alpha": 4.0,
        "hio_rank": 8,
        "dtype": "float32",
        "logging_steps": 4,
        "save_steps": 4,
    }
    if overrides.get("method") == "lora":
        # Dense LoRA prunes nothing, and takes no setting of pruning.
        del settings["hio_rank"]
    return TrainRecipe(**(settings | overrides))
