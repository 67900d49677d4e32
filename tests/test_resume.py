"""An interrupted and resumed training equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pat_serve.errors import RunError, UnfinishedRun
from pat_serve.export.reader import open_run
from pat_serve.plan import PruningPlan
from pat_serve.training.methods.pat import Pat
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe


class CrashError(Exception):
    """Stands for a crash in the middle of a step."""


@pytest.mark.parametrize("crash_step", [2, 6, 13])  # before the first checkpoint; before the freeze (7); after it
def test_resumed_equals_uninterrupted(
    crash_step: int, finished_run: Path, tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    on_step = Pat.on_step

    def crash(self: Pat, step: int) -> None:
        if step == crash_step:
            raise CrashError
        on_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Pat, "on_step", crash)
        with pytest.raises(CrashError):
            start(tiny_recipe(tiny_base, rows), run)

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
    assert len(plan.axes["hidden"].kept) == 48
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    frozen = [line for line in lines if line["step"] > 8 and "gate_kept" in line]
    assert frozen
    assert all(line["gate_kept"] == 48 and line["gate_softness"] == 0 for line in frozen)
    assert lines[1]["gate_mean"] != 0.75  # step 4: still soft


def test_training_moves_everything_that_it_should(finished_run: Path):
    for fold in PruningPlan.load(finished_run).folds.values():
        assert fold.l1_DR.abs().max() > 1e-3
        assert (fold.scale_D - 1).abs().max() > 1e-3
    lora = load_file(finished_run / "adapter/adapter_model.safetensors")
    assert all("lora_" in name for name in lora)
    assert all(tensor.abs().max() > 1e-3 for name, tensor in lora.items() if "lora_B" in name)


def test_a_finished_run_is_not_resumed(finished_run: Path):
    with pytest.raises(RunError, match="a finished one"):
        resume(finished_run)


def test_the_recipe_repeats_the_run(finished_run: Path, tmp_path: Path):
    from pat_serve.training.config import TrainRecipe

    start(TrainRecipe.build(TrainRecipe.read(finished_run / "recipe.yaml"), "recipe.yaml"), tmp_path / "again")
    first, again = (load_file(folder / "plan.safetensors") for folder in (finished_run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
