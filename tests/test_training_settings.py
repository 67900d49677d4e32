"""Settings that trade time for memory change neither the losses nor the precision of what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pat_serve.errors import MissingExtra
from pat_serve.export.exporter import export_run
from pat_serve.training.run import start
from tests.conftest import tiny_recipe


def train(base: Path, rows: Path, run: Path, **settings: object) -> list[list[float]]:
    """Losses and gradient norms of 12 steps."""
    short: dict[str, object] = {"max_steps": 12, "logging_steps": 1, "save_steps": 12, "learning_rate": 1e-3}
    start(tiny_recipe(base, rows, **(short | settings)), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [
        [line[name] for name in ("loss", "cross_entropy", "identity_loss", "grad_norm") if name in line]
        for line in lines
        if "loss" in line
    ]
    assert len(found) == 12
    return found


@pytest.mark.parametrize("method", ["pat", "lora"])
def test_gradient_checkpointing_computes_the_same(method: str, tiny_base: Path, rows: Path, tmp_path: Path):
    # With dropout: the recomputation must draw what the first pass drew.
    settings = {"method": method, "batch_size": 4, "gradient_accumulation_steps": 1}
    plain, recomputed = (
        train(tiny_base, rows, tmp_path / str(wanted), gradient_checkpointing=wanted, **settings)
        for wanted in (False, True)
    )
    assert recomputed == [pytest.approx(line, rel=1e-6) for line in plain]


def test_accumulation_is_a_larger_batch(tiny_base: Path, rows: Path, tmp_path: Path):
    large = train(tiny_base, rows, tmp_path / "4x2", batch_size=4, gradient_accumulation_steps=2, lora_dropout=0)
    small = train(tiny_base, rows, tmp_path / "1x8", batch_size=1, gradient_accumulation_steps=8, lora_dropout=0)
    assert small == [pytest.approx(line, rel=1e-4) for line in large]


def test_bfloat16_keeps_what_is_trained_in_float32(tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = {"dtype": "bfloat16", "batch_size": 4, "gradient_accumulation_steps": 1}
    found = train(tiny_base, rows, run, **settings)
    assert all(torch.isfinite(torch.tensor(line)).all() for line in found)
    trained = load_file(run / "checkpoints/step-12/trained.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    # The scales have values that bfloat16 cannot hold: it has 8 bits, and they moved by less.
    scale = next(tensor for name, tensor in trained.items() if name.endswith("scale_D"))
    assert not torch.equal(scale, scale.bfloat16().float())
    assert any("logits_D" in name for name in trained)
    assert export_run(run, tmp_path / "pruned").parity is not None


def test_quantizing_needs_its_library(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        start(tiny_recipe(tiny_base, rows, quantize_base="nf4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_schedule_leaves_the_mask_alone_where_both_rates_are_equal(tiny_base: Path, rows: Path, tmp_path: Path):
    """The paper does so: 5e-5 is both its learning rate and the mask's."""
    train(tiny_base, rows, tmp_path / "run", mask_learning_rate=1e-3)
    state = torch.load(tmp_path / "run/checkpoints/step-12/optimizer.pt", weights_only=True)
    rates = sorted((group["lr"], len(group["params"])) for group in state["param_groups"])
    assert rates[-1] == (1e-3, 1)
    assert rates[0][0] < 1e-5


def test_an_epoch_is_what_the_trainer_takes_for_one(tiny_base: Path, rows: Path, tmp_path: Path):
    """64 rows in batches of 20: three whole ones and one of 4."""
    recipe = tiny_recipe(tiny_base, rows, max_steps=None, epochs=3, gradient_accumulation_steps=5)
    assert start(recipe, tmp_path / "run").steps == 12
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == pytest.approx(3)
