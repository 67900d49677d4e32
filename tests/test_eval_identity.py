"""A figure is kept for the very data that it was measured on: a hub id whose content moved is measured anew."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from pat_serve.evaluation.identity import dataset_commit, dataset_commits, rows_identity
from pat_serve.evaluation.measuring import measure_models
from pat_serve.evaluation.plan import Plan, Responses
from pat_serve.training.data import load_tokenizer
from tests.tiny_models import save_tiny_llama

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty hub cache, and nothing remembered."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    dataset_commit.cache_clear()
    yield tmp_path / "hub"
    dataset_commit.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub that knows the commits of some data sets, by their ids."""
    commits: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("?")[0].removeprefix("/api/datasets/")
            body = json.dumps({"id": name, "sha": commits[name]} if name in commits else {"error": "none"}).encode()
            self.send_response(200 if name in commits else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield commits
    server.shutdown()
    server.server_close()


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_hub_id_is_its_commit(hub: dict[str, str]):
    hub["me/rows"] = FIRST
    first = rows_identity("me/rows", "test")
    assert first == f"me/rows@{FIRST} (test)"
    hub["me/rows"] = SECOND
    assert rows_identity("me/rows", "test") == first, "one call of a command has one answer"
    dataset_commit.cache_clear()
    assert rows_identity("me/rows", "test") == f"me/rows@{SECOND} (test)"
    assert rows_identity("me/absent", "test") is None
    assert dataset_commits({"me/rows"}) == {"me/rows": SECOND}
    assert dataset_commits({"me/rows", "me/absent"}) is None
    assert dataset_commits(set()) is dataset_commits(None) is None


def test_without_the_hub_its_cache_tells(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    no_hub(monkeypatch)
    assert dataset_commit("me/rows") is None
    repository = fresh / "datasets--me--rows"
    for age, commit in enumerate((SECOND, FIRST)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        os.utime(repository / "snapshots" / commit, (1000 - age, 1000 - age))
    dataset_commit.cache_clear()
    assert dataset_commit("me/rows") == SECOND, "what was fetched last, since no branch is known"
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(FIRST)
    dataset_commit.cache_clear()
    assert dataset_commit("me/rows") == FIRST


def test_files_and_folders_are_their_content(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = [rows_identity(str(path), "test") for path in (folder, folder / "test.jsonl")]
    assert rows_identity(str(folder), "train") != before[0]
    (folder / "test.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    after = [rows_identity(str(path), "test") for path in (folder, folder / "test.jsonl")]
    assert None not in before
    assert not set(before) & set(after)


def test_rows_that_moved_are_measured_anew_and_unknown_ones_always(tmp_path: Path):
    model = save_tiny_llama(tmp_path / "model")
    asked = []

    def measure(state: str | None) -> None:
        def encode(_: Any) -> tuple[list[dict[str, list[int]]], int]:
            asked.append(state)
            return [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], 0

        responses = Responses(name="rows", encode=encode, identity=state, settings={"max_length_tokens": 8})
        measure_models([str(model)], Plan(responses=responses, load_tokenizer=load_tokenizer, out=tmp_path / "out"))

    for state in (FIRST, FIRST, SECOND, FIRST, None, None):
        measure(state)
    assert asked == [FIRST, SECOND, None, None]


def test_the_data_of_tasks_groups_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    from pat_serve.evaluation import lm_eval_tasks

    files = {
        "one": "task: pat14_one\ndataset_path: me/one\ntag: pat14_tag\n",
        "two": "task: pat14_two\ndataset_path: me/two\ntag: pat14_tag\n",
        "files": "task: pat14_files\ndataset_path: json\ndataset_kwargs: {data_files: x.json}\n",
        "own": "task: pat14_own\ncustom_dataset: !function loading.dataset\n",
        "all": "group: pat14_all\ntask:\n- pat14_tag\n- {group: inner, task: [{task: pat14_one, dataset_path: me/x}]}",
        "mixed": "group: pat14_mixed\ntask: [pat14_one, pat14_files]\n",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    monkeypatch.setattr(lm_eval_tasks, "TASK_FOLDER", tmp_path)
    tasks = lm_eval_tasks.Tasks(["pat14_one"])
    assert tasks.data_sources("pat14_one") == {"me/one"}
    assert tasks.data_sources("pat14_tag") == {"me/one", "me/two"}
    assert tasks.data_sources("pat14_all") == {"me/one", "me/two", "me/x"}
    for unknown in ("pat14_files", "pat14_own", "pat14_mixed"):
        assert tasks.data_sources(unknown) is None


def test_a_task_of_the_hub_is_kept_for_its_commit(hub: dict[str, str], tmp_path: Path):
    pytest.importorskip("lm_eval")
    from pat_serve.evaluation.measuring import _Work

    work = _Work([], Plan(tasks=("pat14_copa",), load_tokenizer=load_tokenizer))
    assert work._task_data("pat14_copa") is None
    hub["aps/super_glue"] = FIRST
    dataset_commit.cache_clear()
    assert work._task_data("pat14_copa") == {"aps/super_glue": FIRST}
