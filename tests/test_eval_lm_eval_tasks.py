"""pat-eval on lm-eval's own tasks, with real lm-eval and its dummy model, which always generates "lol"."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from pat_serve.errors import UsageError
from pat_serve.evaluation import lm_eval_tasks
from pat_serve.evaluation.lm_eval_tasks import Tasks, quiet

# Read strictly, "lol" is the second item's answer; flexibly, "l", the first one's.
TASK = """
task: pat14_two_ways
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs: {until: ["x"], max_gen_toks: 4}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - name: flexible
    filter: [{function: regex, regex_pattern: "(l)", group_select: 0}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    data = tmp_path / "items.json"
    data.write_text(json.dumps([{"question": "a?", "answer": "l"}, {"question": "b?", "answer": "lol"}]))
    (tmp_path / "two_ways.yaml").write_text(TASK.replace("DATA", str(data)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_tasks, "TASK_FOLDER", tmp_path)
    return Tasks(["pat14_two_ways"])


def test_an_item_counts_once_however_many_ways_its_answer_is_read(tasks: Tasks):
    from lm_eval.models.dummy import DummyLM

    found = tasks.answers(DummyLM(), "pat14_two_ways", limit=None, num_fewshot=None)
    assert [item.split("/")[1] for item in found.items] == ["0", "1"]
    assert found.right == [0.0, 1.0]


def test_a_number_of_examples_that_would_be_ignored_is_refused(tasks: Tasks):
    from lm_eval.models.dummy import DummyLM

    with pytest.raises(UsageError, match="fixed it at 0"):
        tasks.answers(DummyLM(), "pat14_two_ways", limit=None, num_fewshot=5)


def test_a_log_handler_made_in_silence_lives_on(capsys: pytest.CaptureFixture[str]):
    """vLLM's handler is one: its import makes it, and it logs until the process ends."""
    with quiet():
        handler = logging.StreamHandler()
    capsys.readouterr()
    handler.emit(logging.LogRecord("vllm", logging.ERROR, "file", 1, "the engine ends", (), None))
    assert capsys.readouterr().err == ""
