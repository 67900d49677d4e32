"""A run's figures while it trains, and how it stops when it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from pat_serve.errors import Diverged, EmptyMask, MissingExtra, UsageError
from pat_serve.training.config import TrainRecipe
from pat_serve.training.loop import reporting
from pat_serve.training.loop.callbacks import progress_line
from pat_serve.training.methods.pat.hsm import SharedMask
from pat_serve.training.methods.pat.method import Pat
from pat_serve.training.methods.pat.schedule import GateSchedule
from pat_serve.training.recipe_file import read_recipe
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.test_resume import interrupt


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_gate_and_every_figure(
    tiny_base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    start(tiny_recipe(tiny_base, rows, max_steps=12, eval_share=0.1, eval_steps=6), run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"gate", "mask_logits"} <= set(tags["histograms"])
    losses = {"cross_entropy", "identity_loss", "count_loss", "push_loss"}
    expected = {f"train/{name}" for name in (*losses, "gate_kept", "gate_freeze_gap", "tokens_per_second")}
    assert expected | {"eval/loss", "eval/perplexity"} <= set(tags["scalars"])
    last = events.Histograms("gate")[-1]
    assert (last.step, last.histogram_value.num, last.histogram_value.sum) == (12, 64, 48)

    trained = [line for line in metrics(run) if "cross_entropy" in line]
    assert all(line["tokens_per_second"] > 0 for line in trained)
    # So few steps leave the mask undecided, which has to be said.
    assert trained[-1]["gate_freeze_gap"] > 0.1
    assert "warning: the mask had not decided before its freeze" in capsys.readouterr().err


@pytest.mark.parametrize("crash_step", [2, 7])  # before the first checkpoint, and three steps after it
def test_tensorboard_has_each_step_of_a_resumed_run_once(crash_step: int, tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    written = TensorBoardCallback.on_log

    def log_at_once(self: TensorBoardCallback, *arguments: Any, **settings: Any) -> None:
        written(self, *arguments, **settings)
        self.tb_writer.flush()

    with pytest.MonkeyPatch.context() as patch:
        # A crash may come any time after the writer's own flush, which it makes every two minutes.
        patch.setattr(TensorBoardCallback, "on_log", log_at_once)
        interrupt(run, tiny_recipe(tiny_base, rows, max_steps=12, logging_steps=1), crash_step)
    resume(run)
    # By default it keeps a sample: the last histogram alone.
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/cross_entropy")] == list(range(1, 13))
    assert [event.step for event in events.Histograms("gate")] == list(range(1, 13))


def test_no_reporter_leaves_no_folder(tiny_base: Path, rows: Path, tmp_path: Path):
    recipe = TrainRecipe.build(tiny_recipe(tiny_base, rows, max_steps=12).model_dump() | {"report_to": "none"}, "test")
    start(recipe, tmp_path / "run")
    assert not (tmp_path / "run/tensorboard").exists()
    assert read_recipe(tmp_path / "run/recipe.yaml")["report_to"] == []


def test_a_reporter_that_is_not_installed(tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(reporting._INSTALLED, "wandb", lambda: False)
    settings = tiny_recipe(tiny_base, rows).model_dump() | {"report_to": "tensorboard, wandb"}
    with pytest.raises(MissingExtra, match="--report-to wandb: expected the package wandb"):
        start(TrainRecipe.build(settings, "test"), tmp_path / "run")
    with pytest.raises(UsageError, match="report_to"):
        TrainRecipe.build(settings | {"report_to": "nonsense"}, "test")


def test_the_progress_line():
    logs = {"cross_entropy": 2.34567, "gate_kept": 48.0, "tokens_per_second": 12345.6}
    assert progress_line("pat", logs) == "pat: loss 2.346, 48 channels kept, 12,346 tokens/s"
    assert progress_line("lora", {"cross_entropy": 2.0}) == "lora: loss 2.000"


def test_a_loss_that_is_not_finite_stops_at_its_step(finished_run: Path, tiny_base: Path, rows: Path, tmp_path: Path):
    """A passing fault: the run goes on from its last checkpoint to where it would have come without it."""
    run = tmp_path / "run"
    losses = Pat.losses

    def fault(self: Pat) -> dict[str, torch.Tensor]:
        return losses(self) | ({"identity_loss": torch.tensor(torch.nan)} if self.step == 9 else {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pat, "losses", fault)
        with pytest.raises(Diverged, match=r"step 10: .*found identity_loss nan; the last finite loss was [\d.]+ in"):
            start(tiny_recipe(tiny_base, rows), run)
    resume(run)
    ours, reference = load_file(run / "plan.safetensors"), load_file(finished_run / "plan.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in reference.items())


def test_weights_that_are_not_finite_replace_no_checkpoint(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = Pat.losses

    def spoil(self: Pat) -> dict[str, torch.Tensor]:
        if self.step == 7:  # after the forward pass of a step that ends with a checkpoint
            self.hsms["model.embed_tokens"].l1_DR.data.fill_(torch.inf)
        return losses(self)

    monkeypatch.setattr(Pat, "losses", spoil)
    with pytest.raises(Diverged, match="step 8: expected finite weights in a checkpoint"):
        start(tiny_recipe(tiny_base, rows, gradient_accumulation_steps=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-4"]


def test_a_closed_gate_is_an_error_and_a_passing_dip_is_none():
    mask = SharedMask(16, 8, GateSchedule(milestone=100))
    with torch.no_grad():
        mask.logits_D.fill_(-0.01)
    for step in (1, 30, 60, 80):
        mask.set_step(step)
        mask.require_open()
    mask = SharedMask(16, 8, GateSchedule(milestone=100))
    with torch.no_grad():
        mask.logits_D.fill_(-5)
    mask.set_step(10)
    mask.require_open()  # the offset still holds it open
    mask.set_step(60)
    with pytest.raises(EmptyMask, match="before step 61"):
        mask.require_open()


def test_a_run_stops_on_a_closed_gate(tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_step = Pat.on_step

    def close(self: Pat, step: int) -> None:
        if step == 5:
            self.mask.logits_D.data.fill_(-50)
        on_step(self, step)

    monkeypatch.setattr(Pat, "on_step", close)
    with pytest.raises(EmptyMask, match="--mask-learning-rate"):
        start(tiny_recipe(tiny_base, rows), tmp_path / "run")
