"""An interrupted and resumed training equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pat_serve.errors import ChangedInput, Diverged, RunError, UnfinishedRun
from pat_serve.export.run.reader import open_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.pat.method import Pat
from pat_serve.training.recipe_file import read_recipe
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe, write_rows
from tests.tiny_models import save_tiny_llama


class CrashError(Exception):
    """Stands for a crash in the middle of a step."""


@pytest.mark.parametrize("crash_step", [2, 6, 13])  # before the first checkpoint; before the freeze (7); after it
def test_resumed_equals_uninterrupted(crash_step: int, finished_run: Path, tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    interrupt(run, tiny_recipe(tiny_base, rows), crash_step)
    with pytest.raises(UnfinishedRun, match="pat-train --resume"):
        open_run(run)
    expected = [f"step-{step}" for step in range(4, crash_step + 1, 4)][-2:]
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == sorted(expected)

    resume(run)
    for name in ("plan.safetensors", "adapter/adapter_model.safetensors"):
        ours, reference = load_file(run / name), load_file(finished_run / name)
        assert ours.keys() == reference.keys()
        for key, tensor in reference.items():
            assert torch.equal(ours[key], tensor), key

    def steps(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["cross_entropy"]) for line in lines if "cross_entropy" in line]

    assert steps(run) == steps(finished_run)


def test_the_width_that_was_trained_is_the_width_that_was_asked_for(finished_run: Path):
    plan = PruningPlan.load(finished_run)
    assert len(plan.cuts["hidden"].kept) == 48
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    frozen = [line for line in lines if line["step"] > 8 and "gate_kept" in line]
    assert frozen
    assert all(line["gate_kept"] == 48 and line["gate_softness"] == 0 for line in frozen)
    assert lines[1]["gate_softness"] > 0.01  # step 4: still soft


def test_training_moves_everything_that_it_should(finished_run: Path):
    for fold in PruningPlan.load(finished_run).folds.values():
        assert fold.l1_DR.abs().max() > 1e-3
        assert (fold.scale_D - 1).abs().max() > 1e-3
    lora = load_file(finished_run / "adapter/adapter_model.safetensors")
    assert all("lora_" in name for name in lora)
    assert all(tensor.abs().max() > 1e-3 for name, tensor in lora.items() if "lora_B" in name)


def interrupt(run: Path, recipe: TrainRecipe, crash_step: int) -> None:
    """Start a run that crashes before a step."""
    on_step = Pat.on_step

    def crash(self: Pat, step: int) -> None:
        if step == crash_step:
            raise CrashError
        on_step(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pat, "on_step", crash)
        with pytest.raises(CrashError):
            start(recipe, run)


def test_a_crash_after_the_last_step_can_be_finished(finished_run: Path, tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruningPlan, "save", lambda self, folder: (_ for _ in ()).throw(CrashError))
        with pytest.raises(CrashError):
            start(tiny_recipe(tiny_base, rows), run)
    resume(run)
    ours, reference = load_file(run / "plan.safetensors"), load_file(finished_run / "plan.safetensors")
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("what", ["base", "data"])
def test_a_changed_input_is_noticed(what: str, tmp_path: Path):
    base, data, run = save_tiny_llama(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    interrupt(run, tiny_recipe(base, data, max_steps=None, epochs=2), crash_step=6)
    if what == "base":
        shutil.rmtree(base)
        save_tiny_llama(base, seed=5)
    else:
        write_rows(data, rows=200)
    with pytest.raises(ChangedInput, match="base" if what == "base" else "examples_sha256"):
        resume(run)


def test_resumed_from_another_folder(tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_base.parent)
    interrupt(tmp_path / "run", tiny_recipe(Path(tiny_base.name), rows), crash_step=2)
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "run").steps == 24


def test_a_torn_line_of_metrics_is_no_obstacle(tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    interrupt(run, tiny_recipe(tiny_base, rows), crash_step=6)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "cross_en')
    resume(run)
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_numbers_that_are_not_finite_end_in_an_error(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(Diverged, match="lower --learning-rate"):
        start(tiny_recipe(tiny_base, rows, learning_rate=1e30), tmp_path / "run")
    assert not (tmp_path / "run/plan.json").exists()


def test_a_tokenizer_without_padding(rows: Path, tmp_path: Path):
    """Llama-2's tokenizer has none either."""
    base = save_tiny_llama(tmp_path / "base")
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert start(tiny_recipe(base, rows), tmp_path / "run").steps == 24


def test_a_finished_run_is_not_resumed(finished_run: Path):
    with pytest.raises(RunError, match="a finished one"):
        resume(finished_run)


def test_the_recipe_repeats_the_run(finished_run: Path, tmp_path: Path):
    start(TrainRecipe.build(read_recipe(finished_run / "recipe.yaml"), "recipe.yaml"), tmp_path / "again")
    first, again = (load_file(folder / "plan.safetensors") for folder in (finished_run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
