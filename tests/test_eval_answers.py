"""Written answers: loops, agreement with the first model, and checked sums."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.cli import eval as eval_command
from pat_serve.errors import DataError, UsageError
from pat_serve.evaluation.answers import arithmetic
from pat_serve.evaluation.answers.generate import end_ids
from pat_serve.evaluation.answers.loops import common_start, ends_in_loop, repeated_share
from pat_serve.evaluation.gate import Bound, judge, parse_bound
from pat_serve.evaluation.paired import paired_mean_difference
from pat_serve.evaluation.report import Measure, Report
from pat_serve.tokens.prompts import prompt_ids, prompts_from_file
from tests.test_eval_command import run
from tests.tiny_models import SENTENCES, save_tiny_llama, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}<s>assistant"
LONG = list(range(100, 190))


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([*range(40)], False),
        ([7, 8, 9, 1, 2, 3, 1, 2, 3], True),
        # The loop is cut within its phrase.
        ([7, 8, 9, 1, 2, 3, 1, 2, 3, 1, 2], True),
        # The loop has ended before the answer does.
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 7, 8], False),
        # A phrase of one or two tokens counts from the fifty-first time on.
        ([*range(9), *[5] * 50], False),
        ([*range(9), *[5] * 51], True),
        ([*range(20, 40), *[5, 6] * 50], False),
        ([*range(20, 40), *[5, 6] * 51], True),
        ([*LONG, *LONG], True),
        # A phrase of 91 tokens is too long to be looked for.
        ([*LONG, 1, *LONG, 1], False),
        ([], False),
        ([3], False),
    ],
)
def test_a_loop_is_a_phrase_that_the_answer_ends_with_again_and_again(ids: list[int], loops: bool):
    assert ends_in_loop(ids) is loops


def test_repeated_share_is_that_of_the_literature():
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repeated_share([*range(30)]) == 0
    assert repeated_share([1, 2, 3]) == 0
    assert common_start([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_start([1, 2], [1, 2, 4]) == 2


def test_sums_are_the_same_everywhere_and_checked_by_their_last_number():
    asked = arithmetic.questions()
    assert len({question.text for question in asked}) == arithmetic.QUESTIONS
    assert arithmetic.questions(7) == asked[:7]
    for question in asked:
        a, b = (int(word) for word in question.text.replace("?", "").replace(".", "").split() if word.isdigit())
        assert question.result in (a + b, a - b, a * b)
        assert question.result >= 1
        assert question.right(f"It is {question.result}.")
        assert not question.right(f"It is {question.result}, or rather {question.result + 1}.")
        assert not question.right("It is many.")
    assert arithmetic.Question(text="", result=1200).right("**1,200** apples")


def test_interval_of_a_paired_difference_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        before = draw.normal(0, 3, 8)
        _, low, high = paired_mean_difference(before, before + draw.normal(0.5, 1, 8))
        covered += low <= 0.5 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
    assert np.isnan(paired_mean_difference(np.zeros(5), np.ones(5))[1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model with a chat template, the same one again, and another one."""
    folder = tmp_path_factory.mktemp("models")
    saved = [save_tiny_llama(folder / name, seed=seed) for name, seed in (("dense", 0), ("copy", 0), ("other", 1))]
    for model in saved:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(model)
    return saved


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "asked.jsonl"
    texts = [" ".join(sentence.split()[:4]) for sentence in SENTENCES]
    rows: list[dict[str, object]] = [{"prompt": text} for text in texts[:4]]
    rows += [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in texts[4:]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(report: Report) -> dict[str, Measure]:
    return {measure.name: measure for measure in report.measures}


def test_answers_of_three_models(models: list[Path], prompts: Path, tmp_path: Path, monkeypatch, capsys):
    flags = ["--prompts", prompts, "--answer-tokens", 12, "--arithmetic", "--dtype", "float32", "--batch-size", 4]
    arguments = [*models, *flags, "--limit", 9, "--out", tmp_path / "out", "--json"]
    assert run(monkeypatch, eval_command, *arguments) == 0
    found = measured(Report.model_validate_json(capsys.readouterr().out))
    assert set(found) == {
        *(f"{metric}(asked.jsonl{how})" for metric in ("repetition", "rep4", "length") for how in ("", " sampled")),
        "agreement(asked.jsonl)", "first_divergence(asked.jsonl)", "kl(asked.jsonl)", "acc(arithmetic)",
    }  # fmt: skip
    # A model is itself, through another folder too; random weights are not another's.
    dense, copy, other = (found["agreement(asked.jsonl)"].results[at].value for at in range(3))
    assert dense == copy == 1
    assert other < 0.2
    dense, copy, other = (found["kl(asked.jsonl)"].results[at].value for at in range(3))
    assert dense == copy == pytest.approx(0, abs=1e-6)
    assert other > 0.05
    length = found["length(asked.jsonl)"]
    divergence = found["first_divergence(asked.jsonl)"]
    assert divergence.results[1].value == length.results[0].value
    assert divergence.results[2].value < length.results[0].value
    assert not found["kl(asked.jsonl)"].higher_is_better
    assert not found["repetition(asked.jsonl)"].higher_is_better
    assert "ended" in length.notes[0]

    # All of it is kept: a second call loads no model.
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr("pat_serve.evaluation.answers.generate.open_model", forbidden)
    monkeypatch.setattr("pat_serve.evaluation.answers.agreement.open_model", forbidden)
    assert run(monkeypatch, eval_command, *arguments) == 0
    assert measured(Report.model_validate_json(capsys.readouterr().out)) == found


def test_greedy_answers_and_kl_are_those_of_a_loop_of_our_own(models: list[Path], prompts: Path, tmp_path: Path):
    """No batch, no padding, no cache: one token after the other."""
    from pat_serve.evaluation.answers.agreement import force
    from pat_serve.evaluation.answers.generate import Decoding, generate
    from pat_serve.evaluation.backends import BackendSettings
    from pat_serve.evaluation.subject import Subject
    from pat_serve.training.data import load_tokenizer

    settings = BackendSettings(batch_size=3)
    first, other = (Subject(model.name, model, settings, load_tokenizer) for model in (models[0], models[2]))
    asked = [prompt_ids(first.tokenizer, chat) for chat in prompts_from_file(prompts).chats]
    written, ended = generate(first, asked, Decoding(new_tokens=10))
    forced = force(other, first, asked, written)
    p, q = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for model in (models[0], models[2]))
    assert forced.kl_nats is not None
    for prompt, answer, end, equal, kl in zip(asked, written, ended, forced.equal, forced.kl_nats, strict=True):
        ids, expected, same, apart = list(prompt), [], [], []
        for _ in range(10):
            with torch.no_grad():
                log_p, log_q = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for model in (p, q))
            token = int(log_p.argmax())
            if token in end_ids(models[0]):
                break
            same.append(int(log_q.argmax()) == token)
            apart.append(float((log_p.exp() * (log_p - log_q)).sum()))
            expected.append(token)
            ids.append(token)
        assert answer == expected
        assert end == (len(expected) < 10)
        assert equal == pytest.approx(np.mean(same))
        assert kl == pytest.approx(np.mean(apart), rel=1e-4)


def test_prompts_go_through_the_chat_template_where_there_is_one(prompts: Path, models: list[Path]):
    chats = prompts_from_file(prompts).chats
    assert len(chats) == 9
    assert all(chat[-1]["role"] == "user" for chat in chats)
    with_template = AutoTokenizer.from_pretrained(models[0])
    text = with_template.decode(prompt_ids(with_template, chats[5]))
    assert text == f"<s>user\n{chats[5][0]['content']}\n<s>assistant"
    plain = tiny_tokenizer()
    assert plain.decode(prompt_ids(plain, chats[5])) == chats[5][0]["content"]


@pytest.mark.parametrize("line", ["[1]", '{"text": "x"}', '{"messages": [{"role": "assistant", "content": "x"}]}', "{"])
def test_a_row_without_a_prompt_is_told(line: str, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match="line 2"):
        prompts_from_file(tmp_path / "rows.jsonl")


def test_a_prompt_without_room_for_an_answer_is_told(models: list[Path], prompts: Path, monkeypatch, capsys):
    assert run(monkeypatch, eval_command, models[0], "--prompts", prompts, "--answer-tokens", 250) == 2
    assert "--answer-tokens" in capsys.readouterr().err
    assert run(monkeypatch, eval_command, models[0], "--prompts", prompts, "--temperature", 0) == 2
    assert "--temperature" in capsys.readouterr().err


def test_a_bound_may_be_a_difference_to_the_first_model():
    bound = parse_bound("repetition <= +0.02", "gate.yaml")
    assert (bound.limit, bound.difference, bound.relative, bound.upper) == (0.02, True, False, True)
    assert parse_bound("acc(arithmetic) >= -0.1", "gate.yaml").limit == -0.1
    with pytest.raises(UsageError, match="NUMBERx or"):
        parse_bound("ppl <= +1.02x", "gate.yaml")


@pytest.mark.parametrize(
    ("loops", "items", "outcome"),
    [(0, 300, "pass"), (0, 50, "inconclusive"), (60, 300, "fail"), (4, 300, "inconclusive")],
)
def test_two_more_points_of_loops_are_told_from_sampling_error(loops: int, items: int, outcome: str):
    from pat_serve.evaluation.compare import score_measure

    def bound_of(upper: Bound, reference: list[float], candidate: list[float]) -> str:
        scores = {"dense": [np.array(reference)], "pruned": [np.array(candidate)]}
        same = {model: ["one"] for model in scores}
        measure = score_measure("x", "repetition", scores, same, {}, higher_is_better=False)
        assert measure.results[1].versus_first is not None
        assert (measure.results[1].versus_first.won, measure.results[1].versus_first.lost) == (0, loops)
        return judge([upper], [measure])[0].outcome

    order = random.Random(0).sample(range(items), items)
    # A parent that never loops: no ratio exists, and the difference does.
    candidate = [float(place < loops) for place in order]
    assert bound_of(parse_bound("repetition <= +0.02", "gate"), [0.0] * items, candidate) == outcome
