"""Tests that need a GPU: training there, in bfloat16 and on the kept channels, and an export from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_recipe

# Machines without one, CI's among them, have nothing to run here: what these look for is tensors on two devices.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RECIPES = {
    "the default": {
        "rotate": "loss",
        "mask_start": "energy",
        "gate": "cut",
        "compensate": True,
        "lora_head": True,
        "hio_rank": 0,
    },
    "as published": {},
    "distilled": {"rotate": "loss", "mask_start": "energy", "gate": "cut", "hio_rank": 8, "distillation_weight": 0.5},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_run_on_a_gpu_is_exported(recipe: str, dtype: str, tiny_base: Path, rows: Path, tmp_path: Path):
    from pat_serve.export.exporter import export_run
    from pat_serve.training.run import start

    start(tiny_recipe(tiny_base, rows, dtype=dtype, **RECIPES[recipe]), tmp_path / "run")
    losses = [
        json.loads(line)["cross_entropy"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:-1]
    ]
    assert losses[-1] < losses[0]
    exported = export_run(tmp_path / "run", tmp_path / "pruned")
    assert exported.parity is not None
    assert exported.parity.passed


def test_calibrating_leaves_no_gradient_on_the_gpu(tiny_base: Path, rows: Path):
    from transformers import AutoModelForCausalLM

    from pat_serve.checkpoints.checkpoint import open_checkpoint
    from pat_serve.training.data import PadBatch
    from pat_serve.training.model.calibration import calibrate

    checkpoint = open_checkpoint(str(tiny_base), None)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).cuda()
    batch = PadBatch()([{"input_ids": list(range(3, 20)), "labels": list(range(3, 20)), "attention_mask": [1] * 17}])
    calibrate(base, checkpoint.family, checkpoint.num_layers, [batch], rotate="loss")
    assert all(parameter.grad is None for parameter in base.parameters())
