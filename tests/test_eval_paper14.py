"""The 14 tasks: prompts from the data sets' fields, the same read back from written-out ones, and the scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pat_serve.errors import DataError
from pat_serve.evaluation.paper14 import GROUPS, TASKS, members
from pat_serve.evaluation.paper14.datasets import load
from pat_serve.evaluation.paper14.local_items import FILES, parse_prompt
from pat_serve.evaluation.paper14.questions import SOURCES
from pat_serve.evaluation.paper14.scoring import first_letter, process_results

# One invented row of each data set, with its fields as the hub has them, the prompt that it must give, and the answer.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "arc_challenge": (
        {"question": "Is it?", "choices": {"label": ["1", "2", "3", "4"], "text": ["w", "x", "y", "z"]},
         "answerKey": "3"},
        "Question: Is it?\nA. w\nB. x\nC. y\nD. z\nAnswer:", "C",
    ),
    "arc_easy": (
        {"question": "Is it?", "choices": {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]},
         "answerKey": "D"},
        "Question: Is it?\nA. w\nB. x\nC. y\nD. z\nAnswer:", "D",
    ),
    "boolq": (
        {"passage": "Tea -- Tea is hot.", "question": "is tea hot", "label": 1},
        "Tea -- Tea is hot.\nQuestion: is tea hot\nA. Yes\nB. No\nAnswer:", "A",
    ),
    "copa": (
        {"premise": "It rained.", "question": "effect", "choice1": "It dried.", "choice2": "It got wet.", "label": 1},
        "It rained.\nQuestion: Which may be the effect?\nA. It dried.\nB. It got wet.\nAnswer:", "B",
    ),
    "hellaswag": (
        {"ctx": "A man sits. He", "endings": ["eats.", "flies.", "melts.", "rings."], "label": "0"},
        "A man sits. He\nQuestion: Which ending makes the most sense?\nA. eats.\nB. flies.\nC. melts.\nD. rings.\n"
        "Answer:", "A",
    ),
    "mmlu": (
        {"question": "1 + 1?", "subject": "high_school_maths", "choices": ["1", "2", "3", "4"], "answer": 1},
        "There is a single choice question about high school maths. Answer the question by replying A, B, C or D.\n"
        "Question: 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: ", "B",
    ),
    "multirc": (
        {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Bob", "label": 0},
        "Ann ran.\nQuestion: Who ran?\nAnswer: Bob\nIs it true?\nA. Yes\nB. No\nAnswer:", "B",
    ),
    "openbookqa": (
        {"fact1": "ice is cold", "question_stem": "Cold is", "answerKey": "A",
         "choices": {"label": ["A", "B", "C", "D"], "text": ["ice", "fire", "sun", "tea"]}},
        "Given the fact: ice is cold\nQuestion: Cold is\nA. ice\nB. fire\nC. sun\nD. tea\nAnswer:", "A",
    ),
    "piqa": (
        {"goal": "To cut", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
        "To cut\nA. use a knife\nB. use a spoon\nAnswer:", "A",
    ),
    "rte": (
        {"premise": "Ann ran home.", "hypothesis": "Ann ran.", "label": 0},
        "Ann ran home.\nAnn ran.\nIs the sentence below entailed by the sentence above?\nA. Yes\nB. No\nAnswer:", "A",
    ),
    "siqa": (
        {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "tea", "answerC": "sun",
         "label": "3"},
        "Ann fell.\nQuestion: Why?\nA. ice\nB. tea\nC. sun\nAnswer:", "C",
    ),
    "wic": (
        {"sentence1": "A bank.", "sentence2": "The bank.", "word": "bank", "label": 0},
        "Sentence 1: A bank.\nSentence 2: The bank.\nAre 'bank' in the above two sentenses the same?\n"
        "A. Yes\nB. No\nAnswer:", "B",
    ),
    "winogrande": (
        {"sentence": "Ann met Eve so _ left.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Question: Ann met Eve so _ left.\nA. Ann\nB. Eve\nAnswer:", "B",
    ),
    "wsc": (
        {"text": "Old Ann met Eve when she left .", "span1_text": "Old Ann", "span1_index": 0, "span2_text": "she",
         "span2_index": 5, "label": 1},
        "Passage: * Old Ann * met Eve when # she # left .\n"
        "Question: Does the pronoun # she # refer to * Old Ann *?\nA. Yes\nB. No\nAnswer:", "A",
    ),
}  # fmt: skip


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    """All tasks but HellaSwag and MultiRC, which such a folder may lack; MMLU as two subjects."""
    for task, (_, prompt, letter) in ROWS.items():
        if task not in ("hellaswag", "multirc"):
            items = {str(i): {"origin_prompt": prompt, "prediction": "", "gold": letter} for i in range(2)}
            for name in ("anatomy", "astronomy") if task == "mmlu" else ("",):
                (tmp_path / FILES[task].replace("*", name)).write_text(json.dumps(items))
    return tmp_path


def test_all_fourteen_are_there():
    assert len(TASKS) == 14
    assert set(ROWS) == set(SOURCES) == set(FILES) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_from_the_data_sets_fields(task: str):
    row, prompt, letter = ROWS[task]
    question = SOURCES[task].question(row)
    assert question is not None
    assert question.prompt == prompt
    assert question.as_row()["letter"] == letter


@pytest.mark.parametrize("task", TASKS)
def test_written_out_prompts_are_read_back(task: str):
    row, prompt, letter = ROWS[task]
    assert parse_prompt(prompt, letter) == SOURCES[task].question(row)


def test_arc_leaves_out_what_has_not_four_options():
    row = {"question": "?", "choices": {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}, "answerKey": "A"}
    assert SOURCES["arc_easy"].question(row) is None


def test_lines_that_look_like_options_belong_to_the_stem():
    found = parse_prompt("Read:\nA. Smith wrote\nB. Jones too\nWho?\nA. one\nline more\nB. two\nAnswer:", "B")
    assert found.stem == "Read:\nA. Smith wrote\nB. Jones too\nWho?"
    assert found.options == ("one\nline more", "two")
    assert found.cloze.endswith("Who?\nAnswer:")


@pytest.mark.parametrize(
    ("prompt", "gold", "message"),
    [("Q\nA. x\nB. y", "A", "last line"), ("Q\nAnswer:", "A", "begins with"), ("Q\nA. x\nB. y\nAnswer:", "C", "gold")],
)
def test_other_prompts_are_refused(prompt: str, gold: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt, gold)


@pytest.mark.parametrize("content", ["[]", "{", '{"0": {"gold": "A"}}', '{"0": {"origin_prompt": "Q", "gold": "A"}}'])
def test_other_files_are_refused(content: str, tmp_path: Path):
    (tmp_path / "COPA.json").write_text(content)
    with pytest.raises(DataError, match="origin_prompt and a gold letter"):
        load("copa", str(tmp_path))
    with pytest.raises(DataError, match=r"RTE.json in it"):
        load("rte", str(tmp_path))


def test_the_first_label_is_the_answer():
    assert first_letter(" the answer: B. or A", "AB") == "B"
    # "C" is no label of a question with two options.
    assert first_letter("Correct: A", "AB") == "A"
    assert first_letter("none", "AB") is None
    doc = {"letters": "AB", "letter": "B"}
    assert process_results(doc, ["B"]) == {"acc": 1.0}
    assert process_results(doc, ["b"]) == process_results(doc, [""]) == {"acc": 0.0}


def test_yaml_files_name_every_task():
    folder = Path(__file__).parent.parent / "pat_serve/evaluation/paper14/tasks"
    for group in GROUPS:
        assert yaml.safe_load((folder / f"{group}_group.yaml").read_text())["task"] == members(group)
        for task in members(group):
            config = yaml.safe_load((folder / f"{task}.yaml").read_text())
            assert (config["task"], config["dataset_kwargs"]["name"]) == (
                task,
                task.split("_", 1)[1].removesuffix("_ll"),
            )


def test_through_lm_eval(task_data: Path, tiny_base: Path):
    """Real lm-eval, real model: all twelve in both forms; the items are those of the files, and the means are right."""
    pytest.importorskip("lm_eval")
    from pat_serve.evaluation.measuring import measure_models
    from pat_serve.evaluation.plan import Plan
    from pat_serve.training.data import load_tokenizer

    plan = Plan(tasks=GROUPS, task_data=task_data, load_tokenizer=load_tokenizer)
    _, measures = measure_models([str(tiny_base)], plan)
    by_name = {measure.name: measure for measure in measures}
    for group in GROUPS:
        mean = by_name[f"acc({group})"]
        assert mean.notes == [f"Mean of 12 of 14 tasks; missing: {', '.join(members(group)[i] for i in (4, 6))}."]
        tasks = [by_name[f"acc({task})"].results[0] for task in members(group) if f"acc({task})" in by_name]
        assert [task.items for task in tasks] == [2] * 4 + [4] + [2] * 7
        assert mean.results[0].value == pytest.approx(sum(task.value for task in tasks) / 12)
    assert "acc_norm(pat14_ll)" in by_name
    assert by_name["answer_nll(pat14_ll)"].results[0].value > 0
