"""Distillation: the teacher is the dense base, whatever has become of the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.export.exporter import export_run
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.checks.prepare import prepare
from pat_serve.training.config import TrainRecipe
from pat_serve.training.loop.distillation import distilled
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import calibration_batches
from pat_serve.training.model.teacher import holds_teacher, is_own_teacher
from pat_serve.training.ranks import Ranks
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

LAYERS = 4
CUT = {
    "gate": "auto", "rotate": "auto", "mask_start": "auto", "compensate": None, "lora_head": None, "hio_rank": None,
    "calibration_rows": 8, "lora_dropout": 0.0,
}  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shape", [{"layers": 3, "ffn": 96}, {"hidden": 48}], ids=str)
def test_a_cut_model_is_measured_against_the_dense_one(shape: dict[str, int], rows: Path, tmp_path: Path):
    """The first step's KL is that of the stock models on the files, the dense base's and an export's without a step."""
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[:8]))
    rows = few
    settings = {**CUT, "shape": shape, "batch_size": 8, "gradient_accumulation_steps": 1, "distillation_weight": 1.0}
    # A run without a step would turn the stream to other axes by itself.
    settings |= {"rotate": "loss"} if "hidden" in shape else {}
    start(tiny_recipe(base, rows, **settings, max_steps=0), tmp_path / "cut")
    export_run(tmp_path / "cut", tmp_path / "out", dtype="float32")
    one = tiny_recipe(base, rows, **settings, max_steps=1)
    start(one, tmp_path / "run")
    [batch] = calibration_batches(prepare(one, Ranks.join()).data.samples, 8)
    scores = []
    for folder in (base, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        scores.append(F.log_softmax(logits[batch["labels"][:, 1:] >= 0], dim=-1))
    dense, cut = scores
    wanted = float((dense.exp() * (dense - cut)).sum(-1).mean())
    line = metrics(tmp_path / "run")[0]
    assert wanted > 1e-3
    assert line["distillation"] == pytest.approx(wanted, rel=1e-3)
    assert line["loss"] == pytest.approx(wanted, rel=1e-3), "KL alone, at a weight of one"


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_losses_and_gradient_are_autograds(weight: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pat_serve.training.loop.distillation._PIECE", 64)  # pieces of three positions
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 20, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 20, (2, 9), generator=draw)
    labels[0, :4] = labels[1, 7:] = -100
    logits = student.clone().requires_grad_()
    scores, wanted = (F.log_softmax(x[:, :-1], dim=-1) for x in (logits, teacher))
    counted = labels[:, 1:] >= 0
    kl = (wanted.exp() * (wanted - scores)).sum(-1)[counted].sum()
    entropy = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    ((weight * kl + (1 - weight) * entropy) / 5).backward()
    found = student.clone().requires_grad_()
    losses = distilled(found, teacher, labels, weight, 5)
    losses.loss.backward()
    assert float(losses.kl) == pytest.approx(kl.item() / 5)
    assert float(losses.cross_entropy) == pytest.approx(entropy.item() / 5)
    torch.testing.assert_close(found.grad, logits.grad)
    assert float(distilled(student, teacher, labels, weight, None).kl) == pytest.approx(kl.item() / int(counted.sum()))


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_distilled_run_is_resumed_to_the_bit(train: str, rows: Path, tmp_path: Path):
    base, run = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS), tmp_path / "run"
    settings = {**CUT, "lora_dropout": 0.05, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    start(
        tiny_recipe(base, rows, shape={"layers": 3, "ffn": 96}, distillation_weight=0.5, train=train, **settings), run
    )
    results = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    before = {path: path.read_bytes() for path in results}
    (run / "plan.json").unlink()
    (run / "checkpoints/step-4").rename(tmp_path / "gone")
    resume(run)
    assert {path: path.read_bytes() for path in results} == before


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"method": "lora"}, True),
        ({"gate": "anneal", "mask_start": "zero", "rotate": "none"}, True),
        ({"quantize_base": "nf4"}, True),
        ({"narrow": "off"}, False),
        ({"narrow": "off", "refit": "lora"}, True),
        ({"narrow": "off", "refit": "lora", "train_norms": True}, False),
        ({"gate": "anneal", "mask_start": "zero", "rotate": "none", "train": "head+last3"}, False),
        ({"refit": "lora"}, False),
        ({"shape": "layers=3"}, False),
    ],
)
def test_who_still_contains_the_dense_model(settings: dict[str, Any], own: bool):
    recipe = TrainRecipe.build({"model": "m", "data": "d", "distillation_weight": 0.5, **settings}, "test")
    method = method_of(recipe)
    recipe = recipe.resolved(tied=False, prunes=method.prunes, narrows="hidden" in method.axes)
    assert is_own_teacher(recipe) == own
    assert holds_teacher(recipe) != own
    assert not holds_teacher(recipe.model_copy(update={"distillation_weight": 0.0}))


def test_the_preflight_counts_the_teacher(tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    checkpoint, shape = open_checkpoint(str(base)), {"hidden": 64, "layers": 2}
    held = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())

    def size(**settings: Any) -> Any:
        recipe = TrainRecipe.build({"model": str(base), "data": "d", "shape": "layers=2", **settings}, "test")
        return estimate_training(
            checkpoint, recipe.resolved(tied=False, narrows=False), "bfloat16", shape, 24, 64, "cpu"
        )

    plain, taught = size(), size(distillation_weight=1)
    assert (plain.teacher_bytes, plain.teacher_share) == (0, 0)
    assert taught.teacher_bytes == 2 * held
    assert taught.total_bytes >= plain.total_bytes + 2 * held
    # The dense forward pass beside two or three passes of the smaller model.
    assert 1 / 4 < size(distillation_weight=1, train="all").teacher_share < taught.teacher_share < 1 / 2
    assert f"teacher {2 * held / 1e9:.2f} GB" in taught.parts()
