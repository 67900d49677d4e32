"""Work that is given out together is there, and shares the files that it is said to share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.work_order import FIRST, ROOT, TOGETHER, longest_first


def test_all_files_are_there_once() -> None:
    assert [file for file in FIRST if not (ROOT / file).is_file()] == []
    assert len(set(FIRST)) == len(FIRST)


def test_who_uses_a_shared_fixture_is_in_its_group() -> None:
    server, trainings = TOGETHER.values()
    for files, words in ((server, ("server: Server",)), (trainings, ("trainings: Trainings",))):
        assert [file for file in files if not any(word in (ROOT / file).read_text() for word in words)] == []


def test_the_order_within_a_file_stays() -> None:
    items: list[Any] = [SimpleNamespace(nodeid=f"{file}::test_{n}") for file in ("tests/x.py", FIRST[0]) for n in "ba"]
    longest_first(items)
    assert [item.nodeid for item in items] == [
        f"{FIRST[0]}::test_b", f"{FIRST[0]}::test_a", "tests/x.py::test_b", "tests/x.py::test_a",
    ]  # fmt: skip
