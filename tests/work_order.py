"""Which of pytest-xdist's workers runs which file, and when.

`--dist loadfile` gives a file as a whole to the next worker that is free. Here files that share an engine or a fork
server go to one worker together, so that it is started once. The files that take longest begin first, so that no worker
is left alone with one at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parent.parent
TOGETHER = {
    "the server of tests/integration/conftest.py": (
        "tests/integration/test_abuse_bodies.py",
        "tests/integration/test_abuse_load.py",
        "tests/integration/test_abuse_wire.py",
        "tests/integration/test_benchmark_routes.py",
        "tests/integration/test_clients.py",
        "tests/integration/test_eval_backends.py",
        "tests/integration/test_observability.py",
        "tests/integration/test_rowless.py",
        "tests/integration/test_schemathesis.py",
        "tests/integration/test_server.py",
    ),
    "the trainings of tests/conftest.py": ("tests/test_distributed.py", "tests/test_kill.py"),
}
# The rest in pytest's own order.
FIRST = [file for files in TOGETHER.values() for file in files]
_GROUP_OF = {file: group for group, files in TOGETHER.items() for file in files}
_RANK_OF = {file: rank for rank, file in enumerate(FIRST)}


def longest_first(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files in front, and leave the order within a file as it is."""
    items.sort(key=lambda item: _RANK_OF.get(item.nodeid.partition("::")[0], len(FIRST)))


class FilesTogether(LoadFileScheduling):
    """Gives out files, or groups of them, in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        # By the number of tests, which says little of how long they take.
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _GROUP_OF.get(file, file)
