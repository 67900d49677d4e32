"""The rotation of the residual stream: the same function, strongest channels first, a plain Llama at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.rotation import effective_gain, principal_axes, rotate_model
from pat_serve.export.exporter import export_run
from pat_serve.families.architectures import FAMILIES, LLAMA
from pat_serve.run.plan import PruningPlan
from pat_serve.training.model.calibration import Calibration, calibrate, stream_moments
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family, save_tiny_llama, tiny_llama


def random_rotation(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True).double()
    ids = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        rotate_model(model, LLAMA, 2, random_rotation(64))
        after = model(ids).logits
    # The stock RMSNorm computes in float32 whatever the model's dtype.
    assert (after - before).abs().max() < 1e-5 * before.std()
    assert model.model.embed_tokens.weight is not model.lm_head.weight
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.float64))


def test_large_weights_are_turned_in_pieces() -> None:
    model = tiny_llama(vocab_size=9001, intermediate_size=4500)
    ids = torch.randint(9001, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        rotate_model(model, LLAMA, 2, random_rotation(64))
        assert (model(ids).logits - before).abs().max() < 1e-4 * before.std()


def test_principal_axes_are_orthogonal_and_ordered() -> None:
    vectors = torch.randn(400, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    covariance = vectors.T @ (vectors * torch.linspace(0.1, 2, 16))
    covariance = (covariance + covariance.T) / 2
    rotation, energy = principal_axes(covariance)
    assert torch.allclose(rotation.T @ rotation, torch.eye(16, dtype=torch.float64), atol=1e-12)
    turned = rotation.T @ covariance @ rotation
    assert torch.allclose(turned.diagonal() / turned.trace(), energy, atol=1e-12)
    assert (energy[:-1] >= energy[1:]).all()


def test_covariance_leaves_padding_out_and_weighs_tokens_alike() -> None:
    model = tiny_llama()
    ids = torch.randint(384, (1, 10), generator=torch.Generator().manual_seed(3))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain = stream_moments(model, LLAMA, 2, [alone])["energy"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 6, dtype=torch.int64)], dim=1),
        "attention_mask": torch.tensor([[1] * 10 + [0] * 6]),
        "labels": torch.cat([ids, torch.full((1, 6), -100)], dim=1),
    }
    assert torch.allclose(stream_moments(model, LLAMA, 2, [padded])["energy"], plain, rtol=1e-4, atol=1e-4)
    # 5 norms and 10 tokens, each of square length D = 64.
    assert float(plain.trace()) == pytest.approx(5 * 10 * 64, rel=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_those_of_the_stock_loss(model_type: str, tmp_path: Path) -> None:
    """The reference is the whole model with logits for every token, whose norms' outputs keep their gradients."""
    checkpoint = open_checkpoint(str(save_tiny_family(tmp_path / "base", model_type, head_dim=32)))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    ids = torch.randint(3, 384, (3, 12), generator=torch.Generator().manual_seed(3))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 9:] = 0
    labels[:, :4], labels[1, 9:] = -100, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    outputs: list[tuple[Any, torch.Tensor]] = []

    def keep(norm: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append((norm, output))

    norms = [name for name, spec, _ in checkpoint.family.modules(2) if spec.hidden_norm]
    handles = [model.get_submodule(name).register_forward_hook(keep) for name in norms]
    (model(**batch).loss * (labels[:, 1:] != -100).sum()).backward()
    for handle in handles:
        handle.remove()
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for norm, output in outputs:
        assert output.grad is not None
        gradient = (output.grad[mask.bool()] * effective_gain(norm.weight.detach(), checkpoint.family)).double()
        expected += gradient.T @ gradient
    found = stream_moments(model, checkpoint.family, 2, [batch], with_gradient=True)["gradient"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))


@pytest.mark.parametrize("rotate", ["energy", "loss"])
def test_calibrating_leaves_no_gradient_and_no_weight_frozen(rotate: Literal["energy", "loss"]) -> None:
    model = tiny_llama()
    ids = torch.randint(384, (1, 10), generator=torch.Generator().manual_seed(3))
    model.lm_head.requires_grad_(False)
    calibrate(
        model, LLAMA, 2, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}], rotate=rotate
    )
    assert all(parameter.grad is None for parameter in model.parameters()), "that would be the model once more"
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("rotate", "gate", "tied"), [("energy", "anneal", False), ("loss", "gradual", False), ("loss", "cut", True)]
)
def test_run_on_principal_axes_exports_to_a_plain_llama(
    rotate: str, gate: str, tied: bool, rows: Path, tmp_path: Path
) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    start(
        tiny_recipe(base, rows, ratio=None, hidden_size=48, rotate=rotate, mask_start="energy", gate=gate),
        tmp_path / "run",
    )
    calibration = Calibration.load(tmp_path / "run")
    assert calibration is not None
    plan = PruningPlan.load(tmp_path / "run")
    assert plan.rotation is not None
    assert calibration.rotation_DD is not None
    assert torch.equal(plan.rotation, calibration.rotation_DD)
    exported = export_run(tmp_path / "run", tmp_path / "pruned")
    assert exported.parity is not None
    assert exported.parity.max_abs_over_std < 1e-4
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is False
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.hidden_size == 48


def test_energy_start_keeps_the_strongest_channels_before_a_step_is_taken() -> None:
    from pat_serve.training.methods.pat.hsm import SharedMask
    from pat_serve.training.methods.pat.schedule import GateSchedule

    mask = SharedMask(8, 5, GateSchedule(milestone=10))
    mask.start_from(torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6]))
    assert mask.kept_indices().tolist() == [1, 3, 5, 6, 7]
    assert mask.metrics()["gate_kept"] == 5


def test_a_tied_base_starts_from_the_gradient_of_both_its_uses(rows: Path, tmp_path: Path) -> None:
    """The embedding is the head: one tensor, one gradient."""
    base = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    start(tiny_recipe(base, rows, mask_start="gradient", max_steps=12), tmp_path / "run")
    importance_D = load_file(tmp_path / "run/calibration.safetensors")["importance"]
    assert torch.isfinite(importance_D).all()
    assert importance_D.min() > 0
