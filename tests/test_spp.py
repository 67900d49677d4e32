"""`--method spp`: a sparse model is tuned, keeps its zeros, and is merged exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.pattern import Pattern
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PLAN_ARRAYS, PLAN_JSON, PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.spp import SparseUpdate, SppSettings
from pat_serve.training.run import resume, start

UP = "model.layers.1.mlp.up_proj.weight"


def recipe(base: Path, rows: Path, **changes: object) -> TrainRecipe:
    common = {"max_steps": 6, "batch_size": 4, "gradient_accumulation_steps": 1, "dtype": "float32", "save_steps": 3}
    return TrainRecipe(**{"method": "spp", "model": str(base), "data": str(rows), **common, **changes})


@pytest.fixture(scope="module")
def sparse(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 base, as pat-train and pat-export leave it."""
    folder = tmp_path_factory.mktemp("sparse")
    one_shot = {"calibration_rows": 8, "dtype": "float32", "settings": {"pattern": "2:4"}}
    start(TrainRecipe(method="one-shot", model=str(tiny_base), data=str(rows), **one_shot), folder / "run")
    return export_run(folder / "run", folder / "base").out


@pytest.fixture(scope="module")
def tuned(sparse: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("spp") / "run"
    start(recipe(sparse, rows), run)
    return run


def weight_in(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


def test_zeros_stay_and_the_rest_has_moved(tuned: Path, sparse: Path, tmp_path: Path):
    exported = export_run(tuned, tmp_path / "out")
    assert exported.parity is not None
    assert exported.parity.passed
    assert exported.record["sparsity"]["pattern"] == "2:4"
    for layer in (0, 1):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            before, after = (
                weight_in(folder, f"model.layers.{layer}.{name}.weight") for folder in (sparse, exported.out)
            )
            assert (before == 0).equal(after == 0)
            assert not before.equal(after)
            assert Pattern.parse("2:4").held_by(after)
    # Nothing else was touched.
    assert weight_in(sparse, "model.norm.weight").equal(weight_in(exported.out, "model.norm.weight"))


def test_the_plan_has_weights_and_no_adapter(tuned: Path):
    plan = PruningPlan.load(tuned)
    assert not plan.adapter
    assert not (tuned / "adapter").exists()
    assert set(plan.sparsity.values()) == {"2:4"}
    assert len(plan.sparsity) == 14


def test_the_merged_model_computes_what_the_trained_one_computed(sparse: Path):
    from pat_serve.training.model.insert import adapt

    base = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
    checkpoint = open_checkpoint(str(sparse))
    given = recipe(sparse, sparse)
    ids = torch.arange(3, 35)[None]
    plain = base(ids).logits.detach()
    model, method = adapt(base, checkpoint.family, given, {}, 6)
    model.eval()
    # With b at zero it is the base.
    assert model(ids).logits.equal(plain)
    torch.manual_seed(0)
    for module in method.modules().values():
        torch.nn.init.normal_(module.b_O1, std=0.3)
    tuned = model(ids).logits.detach()
    assert float((tuned - plain).abs().max()) > 0.1
    merged = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
    merged.load_state_dict(dict(method.merged(checkpoint.read)), strict=False)
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-5)


def test_a_training_in_another_dtype_rounds_no_weight(sparse: Path, rows: Path, tmp_path: Path):
    """The first step has no learning rate yet, so that what is merged is the base to the bit."""
    start(recipe(sparse, rows, dtype="bfloat16", max_steps=1, warmup_steps=2), tmp_path / "run")
    with safe_open(tmp_path / "run/weights/trained-00001.safetensors", framework="pt") as file:
        assert file.get_tensor(UP).equal(weight_in(sparse, UP))


def test_recomputation_gives_the_gradients_of_the_plain_expression():
    torch.manual_seed(0)
    update = SparseUpdate(12, 10, SppSettings(rank=4, dropout=0.0))
    torch.nn.init.normal_(update.b_O1)
    weight, x = torch.randn(10, 12), torch.randn(3, 12, requires_grad=True)
    update(x, weight).square().sum().backward()
    found = [x.grad.clone(), update.a_RI.grad.clone(), update.b_O1.grad.clone()]
    for one in (x, update.a_RI, update.b_O1):
        one.grad = None
    rows = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    (x @ (2.0 * weight * update.a_RI[rows] * update.b_O1).T).square().sum().backward()
    for one, gradient in zip((x, update.a_RI, update.b_O1), found, strict=True):
        torch.testing.assert_close(one.grad, gradient)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tuned: Path, tmp_path: Path):
    run = shutil.copytree(tuned, tmp_path / "run")
    for name in (PLAN_JSON, PLAN_ARRAYS, "weights/trained-00001.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints/step-6")
    resume(run)
    assert PruningPlan.load(run).weights == PruningPlan.load(tuned).weights


def test_a_dense_base_is_refused(tiny_base: Path, rows: Path, tmp_path: Path):
    message = "expected a sparse model for --method spp, with 5% zeros .* found 0.00% zeros"
    with pytest.raises(UsageError, match=message):
        start(recipe(tiny_base, rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_authors_rates_are_its_defaults(sparse: Path, rows: Path):
    given = recipe(sparse, rows)
    assert (given.learning_rate, given.weight_decay) == (4e-3, 1e-3)
    assert recipe(sparse, rows, learning_rate=1e-3).learning_rate == 1e-3
    assert given.settings == {"rank": 16, "scale": 2.0, "dropout": 0.05}


def test_settings_of_lora_are_refused(sparse: Path, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--lora-rank: expected none, since --method spp"):
        start(recipe(sparse, rows, lora_rank=8), tmp_path / "run")
