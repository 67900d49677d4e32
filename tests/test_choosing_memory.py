"""The memory that choices on the whole model hold at once, against the pre-flight's count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.training.checks.memory import BatchSize, weights_bytes
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.search.method import Search
from pat_serve.training.model.calibration import calibration_batches
from pat_serve.training.model.ready import choose_on_the_model
from tests.test_preparing_memory import LiveBytes, samples
from tests.tiny_models import save_tiny_llama


@pytest.mark.parametrize(
    ("settings", "lengths", "ffn"),
    [
        ({"method": "llm-pruner"}, (9, 8), 1024),
        ({"method": "llm-pruner"}, (64,) * 8, 128),
        ({"method": "llm-pruner", "choose": {"ffn": "taylor-mixed"}}, (9, 8), 1024),
        ({"method": "llm-pruner", "choose": {"ffn": "taylor-second"}}, (128, 60, 60), 128),
        ({"method": "search", "settings": {"generations": 2, "offspring": 2}}, (9, 8), 512),
    ],
    ids=["sums", "activations", "squares", "a row", "search"],
)
def test_what_is_counted_is_what_is_held(
    settings: dict[str, Any], lengths: tuple[int, ...], ffn: int, tmp_path: Path
) -> None:
    opened = open_checkpoint(str(save_tiny_llama(tmp_path / "base", intermediate_size=ffn)))
    shape = {"hidden": 64, "ffn": ffn - 32}
    given = {"model": str(opened.folder), "data": "d", "shape": {"ffn": ffn - 32}, "compensate": False, **settings}
    recipe = TrainRecipe(**given).resolved(tied=False, narrows=False)
    batches = calibration_batches(samples(*lengths), 8)
    base = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32)
    with LiveBytes(list(base.parameters())) as choosing:
        if recipe.method == Search.name:
            Search.choose(recipe, base, opened.family, shape, batches)
        else:
            choose_on_the_model(base, opened.family, recipe, shape, batches, None)
    sizes = [BatchSize.of(batch) for batch in batches]
    counted = estimate_training(opened, recipe, "float32", shape, 24, 64, "cpu", sizes).preparing_bytes
    assert counted - weights_bytes(opened, recipe, 4, opened.sizes) == pytest.approx(choosing.peak, rel=0.35)
