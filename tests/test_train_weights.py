"""`--train head+last3` and `all`: weights in LoRA's place, what leaves the run, and what it is counted at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.families.architectures import FAMILIES
from pat_serve.run.plan import PruningPlan
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.config import TrainRecipe
from pat_serve.training.loop.trainer import PruningTrainer
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.test_cut_training import PROMPT, ready_of, recipe_of
from tests.test_distillation import CUT
from tests.tiny_models import save_tiny_family

LAYERS = 5
SHAPES = [{"layers": 4, "ffn": 96}, {"hidden": 48}, {"hidden": 48, "layers": 4, "ffn": 96}]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("train", ["head+last3", "all"])
def test_what_was_trained_is_exported(
    train: str, shape: dict[str, int], tied: bool, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The gate compares two readings of the run's files; the model in memory says if they hold what was trained."""
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    seen: list[torch.Tensor] = []
    train_on = PruningTrainer.train

    def train_and_ask(self: Any, *args: Any, **settings: Any) -> Any:
        done = train_on(self, *args, **settings)
        with torch.no_grad():
            seen.append(self.model.eval()(input_ids=PROMPT).logits)
        return done

    monkeypatch.setattr(PruningTrainer, "train", train_and_ask)
    run = tmp_path / "run"
    start(tiny_recipe(base, rows, **CUT, shape=shape, train=train, max_steps=2, learning_rate=5e-3), run)
    plan = PruningPlan.load(run)
    assert plan.adapter == {}
    assert not (run / "adapter").exists()
    assert set(plan.weights) == {path.name for path in (run / "weights").glob("trained-*")}
    assert export_run(run, tmp_path / "out", dtype="float32").parity is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = exported(PROMPT).logits
    assert (found - seen[0]).abs().max() < 1e-4 * found.std()


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"llama"}))
def test_every_family_trains_all_weights(model_type: str, rows: Path, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", model_type, num_hidden_layers=LAYERS)
    start(tiny_recipe(base, rows, **CUT, shape={"layers": 4}, train="all", max_steps=2), tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out", dtype="float32").parity is not None


def test_head_and_last_three_layers_are_those(tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    checkpoint = open_checkpoint(str(base))
    ready = ready_of(checkpoint, recipe_of(base, {"layers": 4}, train="head+last3"))
    trained = {name for name, p in ready.model.get_base_model().named_parameters() if p.requires_grad}
    inside = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    inside += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    wanted = {f"model.layers.{i}.{name}.weight" for i in (1, 2, 3) for name in inside}
    assert trained == {"lm_head.weight", *wanted}


@pytest.mark.parametrize("train", ["head+last3", "all"])
def test_the_preflight_counts_trained_weights(train: str, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    checkpoint, shape = open_checkpoint(str(base)), {"hidden": 48, "layers": 4, "ffn": 96}
    recipe = recipe_of(base, shape, train=train)
    estimate = estimate_training(checkpoint, recipe, "float32", shape, 24, 64, "cpu")
    model = ready_of(checkpoint, recipe).model
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert estimate.lora_parameters == 0
    own = sum(count for name, count in trained.items() if "hsm" in name or "mask" in name or "norm" in name)
    assert estimate.method_parameters == own
    assert estimate.tuned_parameters == sum(trained.values()) - own
    assert estimate.trained_bytes == 16 * sum(trained.values())


def test_a_bfloat16_base_trains_float32_weights(rows: Path, tmp_path: Path):
    base, run = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS), tmp_path / "run"
    recipe = tiny_recipe(
        base, rows, **CUT, shape={"layers": 4}, train="all", max_steps=2, dtype="bfloat16", learning_rate=1e-3
    )
    start(recipe, run)
    for path in (run / "weights").glob("trained-*"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert export_run(run, tmp_path / "out", dtype="bfloat16").parity is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "all", "quantize_base": "nf4"}, "quantized weight"),
        ({"train": "all", "refit": "lora"}, "no adapter"),
        ({"train": "head+last3", "lora_head": True}, "no adapter"),
        ({"train": "norms"}, "'lora', 'head\\+last3' or 'all'"),
    ],
)
def test_what_cannot_be_trained(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        TrainRecipe.build({"model": "m", "data": "d", **settings}, "test")


@pytest.mark.parametrize("setting", ["lora_rank", "lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("how", [{"method": "layers"}, {"method": "cut", "train": "all"}], ids=str)
def test_settings_of_an_adapter_that_is_not_there(setting: str, how: dict[str, Any]):
    recipe = TrainRecipe.build({"model": "m", "data": "d", **how, setting: 0.5 if "dropout" in setting else 8}, "test")
    with pytest.raises(UsageError, match=f"--{setting.replace('_', '-')}: expected none, since --train"):
        recipe.resolved(tied=False, narrows=False)


def test_fsdp_trains_lora_alone(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="--train all: expected one process, DDP or ZeRO-2"):
        start(tiny_recipe(base, rows, shape={"layers": 4}, **CUT, train="all"), tmp_path / "run")
