"""The demo on the real model: its arithmetic and its texts. The slow test at the end takes the model the whole way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.checkpoints.locate import locate
from pat_serve.cli.demo import demo
from pat_serve.demo.corpus import write_rows
from pat_serve.demo.real.budget import (
    AFTER_PROBES,
    AFTER_S,
    LEAST_STEPS,
    MOST_STEPS,
    START_PROBES,
    STEP_PROBES,
    TOTAL_S,
    plan,
)
from pat_serve.demo.real.chat_prompts import chat_prompts
from pat_serve.demo.real.model import fetch
from pat_serve.demo.real.pipeline import RealPipeline
from pat_serve.demo.real.questions import CONVERSATIONS, FACTS, Fact
from pat_serve.demo.real.report import render
from pat_serve.demo.real.self_answers import kept_answers, loops, whole_sentences
from pat_serve.demo.stages import Stage
from pat_serve.demo.tiny.pipeline import Pipeline
from pat_serve.errors import HubError, UsageError


@pytest.mark.parametrize("probe_s", [2.0, 3.0, 4.5])
@pytest.mark.parametrize("before_s", [0.0, 40.0, 90.0])
def test_the_steps_fill_the_ten_minutes_and_no_more(probe_s: float, before_s: float) -> None:
    budget = plan(probe_s=probe_s, before_s=before_s)
    others_s = before_s + AFTER_S + (START_PROBES + AFTER_PROBES) * probe_s
    step_s = STEP_PROBES * probe_s
    assert budget.fits
    assert others_s + budget.steps * step_s <= TOTAL_S
    assert others_s + (budget.steps + 1) * step_s > TOTAL_S or budget.steps == MOST_STEPS


def test_a_slow_machine_takes_few_steps_and_is_told() -> None:
    assert plan(probe_s=30.0, before_s=100.0).steps == LEAST_STEPS
    assert not plan(probe_s=30.0, before_s=100.0).fits
    # The border: exactly the least number of steps fits.
    border_s = (TOTAL_S - 50.0 - AFTER_S) / (START_PROBES + AFTER_PROBES + LEAST_STEPS * STEP_PROBES)
    assert plan(probe_s=border_s * 0.999, before_s=50.0).fits
    assert not plan(probe_s=border_s * 1.001, before_s=50.0).fits


def test_a_fast_machine_does_not_read_the_text_for_ever() -> None:
    assert plan(probe_s=0.01, before_s=5.0).steps == MOST_STEPS


def test_a_faster_machine_takes_no_fewer_steps() -> None:
    steps = [plan(probe_s=tenths / 10, before_s=30.0).steps for tenths in range(1, 200)]
    assert steps == sorted(steps, reverse=True)


def test_prompts_are_many_and_none_is_a_question_of_the_report() -> None:
    prompts = chat_prompts()
    assert len(prompts) == len(set(prompts)) > 600
    assert prompts == chat_prompts()
    asked = {turn for turns in CONVERSATIONS for turn in turns} | {fact.question for fact in FACTS}
    assert not asked & set(prompts)


def test_kept_answers_are_conversations_of_one_turn_to_the_prompts() -> None:
    rows = kept_answers()
    assert len(rows) > 500
    prompts = set(chat_prompts())
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert question["content"] in prompts
        assert answer["content"].strip()
        assert not loops(answer["content"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two. Thr", "One. Two."),
        ("It is 3.5 metres. And", "It is 3.5 metres."),
        ("no end", ""),
        ("- one\n- two:\n  thr", "- one\n- two:"),
    ],
)
def test_an_answer_that_was_cut_off_ends_with_a_whole_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("a b c d, a b c d, a b c d", False),
        ("so it is and so it is and so it is and", True),
        ("it goes on and on and on", False),
        ("", False),
    ],
)
def test_an_answer_that_goes_round_is_known(text: str, looping: bool) -> None:
    assert loops(text) is looping


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("Paris", "The capital of France is PARIS.", True),
        ("seven|7", "There are 7 days.", True),
        ("seven|7", "There are 17 or 70 days.", False),
        ("ice", "Nice.", False),
    ],
)
def test_a_fact_is_right_when_its_words_are_there(answer: str, text: str, right: bool) -> None:
    assert Fact(question="?", answer=answer).right(text) is right


def test_a_folder_belongs_to_one_of_the_two_demos(tmp_path: Path) -> None:
    class Real(RealPipeline):
        def stages(self) -> list[Stage]:
            return [Stage(name="one", title="One", output=self.data, run=self.data.mkdir)]

    class Tiny(Pipeline):
        def stages(self) -> list[Stage]:
            return []

    Real(tmp_path / "out").run()
    Real(tmp_path / "out").run()
    with pytest.raises(UsageError, match="found the real demo"):
        Tiny(tmp_path / "out").run()
    # A folder of the time before there were two.
    (tmp_path / "old/base").mkdir(parents=True)
    with pytest.raises(UsageError, match="found the tiny demo"):
        Real(tmp_path / "old").run()
    assert json.loads((tmp_path / "out/demo.json").read_text()) == {"demo": "real"}


def test_without_the_index_the_small_model_takes_its_place_where_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def export(pipeline: Pipeline) -> list[Stage]:
        made = Stage(name="export_pruned", title="Make it", output=pipeline.pruned, run=pipeline.pruned.mkdir)
        return [made, *(stage for stage in whole(pipeline) if stage.name == "notice")]

    whole = Pipeline.stages
    monkeypatch.setattr(Pipeline, "stages", export)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(HubError, match="No matching distribution"):
        demo(out, model_only=True)
    assert not (out / "demo.json").exists()
    demo(out, model_only=True, or_tiny=True)
    assert "No matching distribution" in (told := capsys.readouterr().err)
    assert "--or-tiny: going on with the small model" in told
    assert (out / "pruned/NOTICE").read_text().startswith("The small demo's model, pruned.")
    assert json.loads((out / "demo.json").read_text()) == {"demo": "tiny"}


def _shape(layers: int, ffn: int) -> dict[str, int]:
    return {"hidden_size": 576, "num_hidden_layers": layers, "intermediate_size": ffn, "num_key_value_heads": 3}


def findings() -> dict[str, Any]:
    """Findings as `real_findings` collects them, with one conversation in which a model says markup."""
    said = {"text": "<script>alert(1)</script>", "finish_reason": "length", "usage": {}, "timings": {}}
    ratio = {"median": 1.1, "low": 1.05, "high": 1.15}
    regime = {
        "regime": "decode", "baseline": {"median": 0.01}, "candidate": {"median": 0.009}, "ratio": ratio,
        "ceiling": 1.33, "verdict": "inconclusive", "reason": "the interval contains the claim",
    }  # fmt: skip
    perplexity = {"perplexity": 10.0, "items": 5, "tokens": 77, "nll_nats": 2.3, "nll_standard_error_nats": 0.1}
    return {
        "date": "2026-11-29T00:00:00+00:00",
        "machine": {"cpu_model": "a <fast> one", "cpu_cores": 2},
        "plan": {"steps": 41, "rows": 600, "rows_per_step": 16, "probe_s": 2.5},
        "models": {
            "parent": {"parameters": 1000, "shape": _shape(30, 1536)},
            "pruned": {"parameters": 910, "shape": _shape(24, 1280), "weights_bytes": 1820},
        },
        "parity": {"max_abs_over_std": 1e-6, "positions": 300},
        "quality": {"held-out answers": {"parent": perplexity, "pruned": perplexity | {"perplexity": 15.0}}},
        "facts": {"parent": 1, "pruned": 0, "asked": 1},
        "talk": [{"questions": ["Who & what?", "Why?"], "answers": {"parent": [said, said], "pruned": [said, said]}}],
        "fact_answers": [
            {
                "question": "Q?",
                "expected": "A",
                "answers": {"parent": {"text": "A", "right": True}, "pruned": {"text": "<b>", "right": False}},
            }
        ],
        "speedup": {
            "settings": {"claim": 1.05}, "verdict": "inconclusive", "reason": "one is open", "rounds": 12,
            "dtype": "bfloat16", "regimes": [regime],
        },
        "training": [{"step": 1, "cross_entropy": 2.0, "distillation": 0.5}],
        "stage_s": {"prune": 100.0},
    }  # fmt: skip


def test_the_report_shows_both_answers_and_makes_no_markup_of_them() -> None:
    html = render(findings())
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; …") == 4
    assert "a &lt;fast&gt; one" in html
    assert "Who &amp; what?" in html
    for figure in (
        "41 steps",
        "of 600 in which",
        "30 to 24 layers, 1536 to 1280 FFN channels,",
        "-9.0%",
        "+50%",
        "1.100x [1.050, 1.150]",
        "0 of 1",
    ):
        assert figure in html, figure


@pytest.mark.slow
def test_the_real_model_goes_the_whole_way(tmp_path: Path) -> None:
    """Fetched, cut, tuned for two steps, exported in bfloat16 through the gate, and read by stock transformers."""
    file = fetch(tmp_path / "parent")
    rows = kept_answers()
    write_rows(tmp_path / "train.jsonl", rows[:32])
    write_rows(tmp_path / "heldout.jsonl", rows[32:48])
    command(
        "pat-train", "--model", file, "--data", tmp_path / "train.jsonl",
        "--shape", "layers=24,ffn=1280", "--max-steps", "2",
        "--batch-size", "4", "--gradient-accumulation-steps", "1", "--calibration-rows", "16",
        "--learning-rate", "1e-3", "--max-length-tokens", "128", "--out", tmp_path / "run",
    )  # fmt: skip
    command("pat-export", "--ckpt", tmp_path / "run", "--out", tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned/pat_export.json").read_text())
    assert record["shape"]["num_hidden_layers"] == {"base": 30, "exported": 24}
    assert record["parameters"]["exported"] < 0.77 * record["parameters"]["base"]  # the head stays tied
    quality = json.loads(command("pat-eval", file, tmp_path / "pruned", "--data", tmp_path / "heldout.jsonl", "--json"))
    [measure] = quality["measures"]
    parent, pruned = (result["value"] for result in measure["results"])
    # Two steps after the cut: a model still, and a worse one. A lost scale or eps gives thousands.
    assert 1 < parent < pruned < 40 * parent
    # The parent, read from the GGUF file, is the chat model that its authors made.
    folder = locate(str(file))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for model, expected in ((folder, "Paris"), (tmp_path / "pruned", "")):
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        answer = stock.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert len(answer) > 0
        assert expected in tokenizer.decode(answer)


def command(name: str, *arguments: object) -> str:
    """Run one of our commands; its output."""
    program = Path(sys.executable).with_name(name)
    return subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout
