"""A tied head stays tied when the stream is turned: what is left out of the rotation, and the last norm's gain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.rotation import effective_gain, rotate_model
from pat_serve.errors import ChangedInput, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.families.architectures import FINAL_NORM
from pat_serve.run.plan import PruningPlan
from pat_serve.training import PatConfig, apply_pat, save_run
from pat_serve.training.model.calibration import calibrate
from pat_serve.training.model.tie import axes_beside, column_energies, fitted_gain, gain_of_the_turned
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.test_recipe_defaults import DEFAULTS
from tests.tiny_models import save_tiny_family

SIZE = 64


def tied_base(folder: Path, model_type: str = "llama", alone: int = 8, **settings: Any) -> Path:
    """A tied base whose last gain is a constant but on the first channels."""
    base = save_tiny_family(folder, model_type, head_dim=32, tie_word_embeddings=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(base)
    offset = open_checkpoint(str(base)).family.norm_offset
    with torch.no_grad():
        gain = torch.full((SIZE,), 0.7)
        gain[:alone] = torch.linspace(-3, 5, alone)
        model.get_submodule(FINAL_NORM).weight.copy_(gain - offset)
    model.save_pretrained(base)
    return base


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 384, (2, 4, 40), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


def test_channels_of_another_gain_are_left_alone_where_the_logits_feel_them() -> None:
    gain, energies, columns = (torch.ones(SIZE, dtype=torch.float64) for _ in range(3))
    gain[[3, 40, 50]] = torch.tensor([-2.0, 9.0, 9.0], dtype=torch.float64)
    energies[50] = 1e-9
    gain[torch.arange(10, 20)] = 1.5
    alone, turned = gain_of_the_turned(gain, energies, columns)
    assert {3, 40} < set(alone.tolist())
    assert 50 not in alone
    assert len(alone) == SIZE // 8
    assert torch.equal(turned[alone], gain[alone])
    others = sorted(set(range(SIZE)) - set(alone.tolist()))
    # Ten channels of 1.5 begin with; six of them are alone.
    assert len(set(turned[others].tolist())) == 1
    assert float(turned[others][0]) == pytest.approx((51 + 4 * 1.5) / 55, rel=1e-6)


def test_axes_beside_those_that_are_left_alone() -> None:
    vectors = torch.randn(200, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = vectors.T @ vectors
    alone = torch.tensor([5, 60])
    rotation, importance = axes_beside(metric, alone)
    assert torch.allclose(rotation.T @ rotation, torch.eye(SIZE, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rotation[:, alone], torch.eye(SIZE, dtype=torch.float64)[:, alone])
    others = [at for at in range(SIZE) if at not in (5, 60)]
    assert importance[alone].min() > importance[others].max()
    turned = (rotation.T @ metric @ rotation).diagonal() / metric.trace()
    assert torch.allclose(turned[others], importance[others], atol=1e-12)
    assert (importance[others].diff() <= 0).all()


def test_the_fitted_gain_gives_the_dense_logits_best() -> None:
    """Against a least-squares solver on the logits of every token, one column a channel."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    head, mixed, kept = draw(90, 12), draw(12, 12), torch.tensor([0, 2, 3, 7, 9, 11])
    x = draw(400, 12)
    z = x[:, kept] + 0.3 * draw(400, 6)
    found = fitted_gain(head, mixed, x.T @ z, z.T @ z, kept)
    logits = x @ (head @ mixed).T
    columns = (z[:, None, :] * head[None, :, kept]).flatten(0, 1)
    best = torch.linalg.lstsq(columns, logits.flatten()[:, None]).solution[:, 0]

    def error(gain: Tensor) -> float:
        return float((columns @ gain - logits.flatten()).square().sum())

    # But for the ridge.
    assert error(best) <= error(found[kept]) < error(best) * (1 + 1e-5)
    gone = [1, 4, 5, 6, 8, 10]
    assert torch.equal(found[gone], mixed.diagonal()[gone])


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
@pytest.mark.parametrize("exact", [True, False])
@torch.no_grad()
def test_the_turned_model_is_the_base_but_for_the_gain_that_was_made_constant(
    model_type: str, exact: bool, tmp_path: Path
) -> None:
    base = tied_base(tmp_path / "base", model_type)
    checkpoint = open_checkpoint(str(base))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    norm, ids = model.get_submodule(FINAL_NORM), batches()[0]["input_ids"]
    if not exact:
        norm.weight.add_(torch.linspace(-0.1, 0.1, SIZE))
    measured = calibrate(model, checkpoint.family, 2, batches(), rotate="loss", keeps_tie=True)
    assert measured.rotation_DD is not None
    assert measured.last_gain_D is not None
    before = model(input_ids=ids).logits
    gain = effective_gain(norm.weight, checkpoint.family).double()
    if not exact:
        # The documented approximation, on the base itself.
        norm.weight.copy_(measured.last_gain_D)
        expected = model(input_ids=ids).logits
        assert (before - expected).abs().max() > 1e-2 * before.std()
    else:
        expected = before
        assert torch.allclose(measured.last_gain_D + checkpoint.family.norm_offset, gain.float(), atol=1e-6)
    rotate_model(model, checkpoint.family, 2, measured.rotation_DD, keeps_tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (measured.rotation_DD - torch.eye(SIZE)).abs().max() > 0.1
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-4 * before.std()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"refit": "lora", "train_norms": True}),
        ("llama", {"narrow": "off", "hio_rank": 4}),
        ("gemma", {}),
        ("qwen2", {"shape": {"hidden": 48, "ffn": 96}}),
    ],
    ids=["default", "lora and norms", "wide", "gemma", "qwen2 and ffn"],
)
def test_a_default_run_of_a_tied_base_exports_tied(
    model_type: str, settings: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    base = tied_base(tmp_path / "base", model_type)
    run = tmp_path / "run"
    start(tiny_recipe(base, rows, **DEFAULTS | settings, max_steps=6, calibration_rows=16), run)
    plan = PruningPlan.load(run)
    assert plan.tied
    assert plan.rotation is not None
    assert not any("lm_head" in name for name in load_file(run / "adapter/adapter_model.safetensors"))
    done = export_run(run, tmp_path / "out")
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 1e-4
    assert json.loads((done.out / "config.json").read_text())["tie_word_embeddings"]
    files = load_file(done.out / "model.safetensors")
    assert "lm_head.weight" not in files
    # A quarter of the channels is a quarter of the parameters.
    if "shape" not in settings:
        exported = sum(tensor.numel() for tensor in files.values())
        stored = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
        assert exported / stored == pytest.approx(0.75, abs=0.01)


def test_the_gain_is_fitted_and_a_resumed_run_has_the_same(rows: Path, tmp_path: Path) -> None:
    base, run = tied_base(tmp_path / "base"), tmp_path / "run"
    start(tiny_recipe(base, rows, **DEFAULTS, max_steps=6, save_steps=3, calibration_rows=16), run)
    plan = PruningPlan.load(run)
    gain = plan.norms[FINAL_NORM][plan.cuts["hidden"].kept]
    assert len(set(gain.tolist())) > SIZE // 2, "a gain that is fitted differs from channel to channel"
    results = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    before = {path: path.read_bytes() for path in results}
    for lost in ("checkpoints/step-6", "checkpoints"):
        (run / "plan.json").unlink()
        (run / lost).rename(tmp_path / lost.replace("/", "-"))
        resume(run)
        assert {path: path.read_bytes() for path in results} == before


def test_a_notebook_keeps_the_tie_too(tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base")
    examples = [{"input_ids": row.tolist()} for batch in batches() for row in batch["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = apply_pat(model, PatConfig(lora_rank=4), calibration=examples)
    # The callback says so when a Trainer has come to its end.
    model.pat.trained = True
    ids = batches()[0]["input_ids"][:2]
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
    done = export_run(save_run(model, tmp_path / "run", prompts=ids.tolist()), tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(done.out).eval()(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
    assert "lm_head.weight" not in load_file(done.out / "model.safetensors")


def test_a_run_that_was_begun_untied_is_not_met_with_a_tied_model(rows: Path, tmp_path: Path) -> None:
    """An earlier version's recipe said auto, too."""
    run = tmp_path / "run"
    start(tiny_recipe(tied_base(tmp_path / "base"), rows, **DEFAULTS, max_steps=1), run)
    (run / "plan.json").unlink()
    inputs = json.loads((run / "inputs.json").read_text())
    del inputs["keeps_tie"]
    (run / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(ChangedInput, match="keeps_tie"):
        resume(run)


@pytest.mark.parametrize(
    ("settings", "tie", "rotate"),
    [
        ({}, "keep", "loss"),
        ({"tied_embeddings": "keep"}, "keep", "loss"),
        ({"tied_embeddings": "untie"}, "untie", "loss"),
        ({"tied_embeddings": "keep", "rotate": "none"}, "keep", "none"),
        ({"distillation_weight": 0.5}, "keep", "loss"),
        ({"train": "all"}, "keep", "loss"),
        ({"gate": "gradual"}, "untie", "loss"),
        ({"compensate": False}, "untie", "loss"),
        ({"lora_head": True}, "untie", "loss"),
    ],
)
def test_what_becomes_of_the_tie(settings: dict[str, Any], tie: str, rotate: str, rows: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, rows, **DEFAULTS | settings).resolved(tied=True)
    assert (recipe.tied_embeddings, recipe.rotate) == (tie, rotate)
    assert recipe.keeps_tie == (tie == "keep" and rotate != "none")
    assert recipe.lora_head == (tie == "untie")
    assert recipe.resolved(tied=True) == recipe
    assert not tiny_recipe(tmp_path, rows, **DEFAULTS).resolved(tied=False).keeps_tie


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "gradual", "rotate": "loss", "tied_embeddings": "keep"}, "--rotate unties the head, unless"),
        ({"lora_head": True, "rotate": "loss", "tied_embeddings": "keep"}, "--tied-embeddings untie"),
    ],
)
def test_a_tie_that_cannot_be_kept_is_refused(
    settings: dict[str, Any], message: str, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        start(tiny_recipe(tied_base(tmp_path / "base"), rows, **DEFAULTS | settings), tmp_path / "run")


def test_a_columns_energy_is_taken_in_pieces() -> None:
    weight = torch.randn(9000, 6)
    torch.testing.assert_close(column_energies(weight), weight.double().square().sum(0), rtol=1e-5, atol=0)
