"""Held-out perplexity while a run trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pat_serve.errors import ChangedInput, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.perplexity import measure_perplexity
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import encode_rows, load_rows, load_tokenizer
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe, write_rows
from tests.test_resume import interrupt


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "eval_loss" in line}


def test_held_out_perplexity_is_what_the_export_has(tiny_base: Path, rows: Path, tmp_path: Path):
    """The last evaluation's figure is pat-eval's of the exported model: no loss of the method's is in it."""
    held_out = write_rows(tmp_path / "held_out.jsonl", rows=13)
    settings = {"eval_data": str(held_out), "eval_steps": 10, "max_steps": 24, "packing": True}
    start(tiny_recipe(tiny_base, rows, **settings), tmp_path / "run")
    figures = evaluations(tmp_path / "run")
    assert sorted(figures) == [10, 20, 24]
    for line in figures.values():
        assert "cross_entropy" not in line  # which belong to the next line of training
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
    out = export_run(tmp_path / "run", tmp_path / "out").out
    tokenizer = load_tokenizer(out)
    examples, _ = encode_rows(load_rows(str(held_out), "train", tokenizer), tokenizer, 256)
    measured = measure_perplexity(out, examples, dtype=torch.float32)
    assert figures[24]["eval_perplexity"] == pytest.approx(measured.perplexity, rel=1e-4)


def test_a_share_is_held_out_and_training_with_it_resumes(tiny_base: Path, rows: Path, tmp_path: Path):
    recipe = tiny_recipe(tiny_base, rows, eval_share=0.1, eval_steps=6)
    start(recipe, tmp_path / "whole")
    interrupt(tmp_path / "run", recipe, crash_step=9)
    resume(tmp_path / "run")

    def losses(run: Path) -> dict[int, float]:
        return {step: line["eval_loss"] for step, line in evaluations(run).items()}

    assert sorted(losses(tmp_path / "run")) == [6, 12, 18, 24]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_changed_held_out_data_is_noticed(tiny_base: Path, rows: Path, tmp_path: Path):
    held_out = write_rows(tmp_path / "held_out.jsonl", rows=4)
    interrupt(tmp_path / "run", tiny_recipe(tiny_base, rows, eval_data=str(held_out)), crash_step=3)
    write_rows(held_out, rows=5)
    with pytest.raises(ChangedInput, match="held_out_sha256"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumes_where_it_was(packing: bool, tiny_base: Path, rows: Path, tmp_path: Path):
    recipe = tiny_recipe(tiny_base, rows, streaming=True, packing=packing, max_steps=12)
    start(recipe, tmp_path / "whole")
    interrupt(tmp_path / "run", recipe, crash_step=10)
    assert "first 64 examples" in json.loads((tmp_path / "run/inputs.json").read_text())["examples_sha256"]
    resume(tmp_path / "run")
    one, two = ((tmp_path / name / "plan.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == two


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "max_steps beside streaming"),
        ({"streaming": True, "max_steps": 20, "eval_share": 0.1}, "cannot be split"),
        ({"eval_data": "x", "eval_share": 0.1}, "not both"),
        ({"eval_share": 1.0}, "eval_share"),
        ({"eval_steps": 0}, "eval_steps"),
    ],
)
def test_settings_that_contradict(settings: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        TrainRecipe.build({"model": "m", "data": "d"} | settings, "recipe")
