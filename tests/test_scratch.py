"""A measurement's scratch folder, and its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from pat_serve.errors import EngineError, UsageError
from pat_serve.server.bench.scratch import scratch_folder


@pytest.mark.parametrize(
    ("error", "log", "left"),
    [
        (EngineError("engine", expected="a", found="b", fix="c"), "side/engine.log", True),
        (EngineError("engine", expected="a", found="b", fix="c"), "side/notes.txt", False),
        (UsageError("--flag", expected="a", found="b", fix="c"), "side/engine.log", False),
    ],
)
def test_the_log_of_an_engine_that_failed_is_all_that_stays(error: Exception, log: str, left: bool):
    made: list[Path] = []

    def measure() -> None:
        with scratch_folder() as folder:
            made.append(folder / log)
            made[0].parent.mkdir()
            made[0].write_text("told")
            raise error

    with pytest.raises(type(error)):
        measure()
    assert made[0].exists() == left


def test_nothing_stays_of_what_went_well():
    with scratch_folder() as folder:
        (folder / "engine.log").write_text("told")
    assert not folder.exists()
