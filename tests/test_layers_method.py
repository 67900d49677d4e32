"""Layer pruning as reassessed: which layers go by default, what is trained, and what leaves the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

# This method has none of the settings that `tiny_recipe` makes for PAT.
PLAIN = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "lora_head": None, "hio_rank": None}


def test_the_last_quarter_goes_and_the_end_is_trained(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=8, tie_word_embeddings=True)
    recipe = tiny_recipe(base, rows, method="layers", max_steps=2, calibration_rows=8, learning_rate=1e-3, **PLAIN)
    start(recipe, tmp_path / "run")
    plan = PruningPlan.load(tmp_path / "run")
    assert plan.cuts.layers_kept(8) == [0, 1, 2, 3, 4, 5]
    written = {name for file in plan.weights for name in load_file(tmp_path / "run/weights" / file)}
    assert {name.split(".")[2] for name in written if ".layers." in name} == {"3", "4", "5"}
    # The head is the embedding, and is trained as both.
    assert "model.embed_tokens.weight" in written
    export_run(tmp_path / "run", tmp_path / "pruned")
    dense, cut = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "pruned"))
    assert cut.config.num_hidden_layers == 6
    moved = {
        name
        for name, tensor in cut.state_dict().items()
        if not tensor.equal(dense.state_dict()[name].to(tensor.dtype)) and "norm" not in name
    }
    assert moved == written | {"lm_head.weight"}


def test_another_order_needs_no_shape() -> None:
    given = {"model": "m", "data": "d", "choose": {"layers": "last"}}
    assert TrainRecipe(**given, method="layers").choose == {"layers": "last"}
    with pytest.raises(ValueError, match="choose says how to cut an axis of shape or axes, and layers is none"):
        TrainRecipe(**given)


def test_it_cuts_nothing_else(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=4)
    with pytest.raises(UsageError, match="axes of --method layers: layers"):
        start(tiny_recipe(base, rows, method="layers", shape={"ffn": 96}, **PLAIN), tmp_path / "run")


def test_a_shallow_base_needs_a_shape(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=2)
    with pytest.raises(UsageError, match="--shape with counts"):
        start(tiny_recipe(base, rows, method="layers", **PLAIN), tmp_path / "run")
