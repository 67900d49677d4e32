"""Starting the adapter where it makes up for the cut: nearer to the dense model before a step is taken, exact after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.cut.rotation import ROWS_AT_ONCE
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.families.architectures import FAMILIES
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import Method
from pat_serve.training.model.branches import branches
from pat_serve.training.model.calibration import Calibration, calibrate
from pat_serve.training.model.insert import adapt, load_base
from pat_serve.training.model.least_squares import RIDGE, Moments, low_rank_update
from pat_serve.training.model.linears import product
from pat_serve.training.run import start
from tests.compensating import make_up
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family, save_tiny_llama

CUT = {"rotate": "energy", "mask_start": "energy", "gate": "cut"}


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(384, (4, 8, 32), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 3, 20:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


def test_update_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    inputs = torch.randn(200, 16, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 3, 16)
    factor = torch.linalg.cholesky(inputs.T @ inputs)
    b, a = low_rank_update((change @ factor).float(), factor, rank=4)
    error = float((inputs @ (change - b.double() @ a.double()).T).square().sum())
    # Eckart-Young: what the four largest singular values of the outputs' matrix leave.
    best = float(torch.linalg.svdvals(inputs @ change.T)[4:].square().sum())
    assert error == pytest.approx(best, rel=1e-3)
    assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-4)


def noisy_moments(tokens: int, scale_K: Tensor) -> tuple[Moments, Tensor]:
    """Moments of outputs that inputs of some scale explain by half, and the weights that explain them."""
    generator = torch.Generator().manual_seed(1)
    true_OK = torch.randn(6, 16, dtype=torch.float64, generator=generator) / scale_K
    z_NK = torch.randn(tokens, 16, dtype=torch.float64, generator=generator) * scale_K
    noise_NO = 4 * torch.randn(tokens, 6, dtype=torch.float64, generator=generator)
    moments = Moments()
    moments.add(z_NK @ true_OK.T + noise_NO, z_NK)
    return moments, true_OK


def test_few_tokens_change_the_weights_less_and_come_nearer_to_the_right_ones() -> None:
    scale_K = torch.logspace(-1, 1, 16, dtype=torch.float64)

    def error(weight_OK: Tensor, true_OK: Tensor) -> float:
        return float(((weight_OK - true_OK) * scale_K).square().sum())

    for tokens, few in ((24, True), (100_000, False)):
        moments, true_OK = noisy_moments(tokens, scale_K)
        now_OK = true_OK + 0.5 * true_OK.roll(1, 0)
        plain_OK = now_OK + moments.change(now_OK, shrinkage=0.0)[0]
        held_OK = now_OK + moments.change(now_OK)[0]
        if few:
            assert error(held_OK, true_OK) < 0.5 * error(plain_OK, true_OK)
            assert error(held_OK, true_OK) < error(now_OK, true_OK)
        else:
            torch.testing.assert_close(held_OK * scale_K, plain_OK * scale_K, rtol=0.01, atol=0.01)
        # Weights that are right already stay, however many tokens there are, where outputs have no noise.
        exact = Moments()
        z_NK = torch.randn(tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * scale_K
        exact.add(z_NK @ true_OK.T, z_NK)
        assert float((exact.change(true_OK)[0] * scale_K).abs().max()) < 1e-4


def test_an_inputs_scale_makes_no_difference_to_its_part() -> None:
    scale_K = torch.logspace(-0.5, 0.5, 16, dtype=torch.float64)
    (scaled, _), (plain, _) = noisy_moments(40, scale_K), noisy_moments(40, torch.ones_like(scale_K))
    zeros_OK = torch.zeros(6, 16, dtype=torch.float64)
    scaled_OK, plain_OK = scaled.change(zeros_OK)[0] * scale_K, plain.change(zeros_OK)[0]
    # But for the ridge, which is the same number for all inputs.
    assert float((scaled_OK - plain_OK).norm() / plain_OK.norm()) < 0.005


def test_a_large_weight_is_taken_in_pieces_and_whole() -> None:
    weight, felt = torch.randn(2 * ROWS_AT_ONCE + 5, 8).bfloat16(), torch.randn(8, 6)
    torch.testing.assert_close(product(weight, felt).double(), weight.double() @ felt.double(), rtol=1e-5, atol=1e-5)


def test_a_weight_of_zeros_keeps_its_adapter(tiny_base: Path, rows: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    measured = Calibration(importance_D=torch.linspace(1, 0, 64), rotation_DD=None)
    recipe = tiny_recipe(tiny_base, rows, **CUT | {"rotate": "none"})
    model, method = adapt(
        load_base(checkpoint, recipe, torch.float32), checkpoint.family, recipe, {"hidden": 48}, 24, measured
    )
    method.on_step(0)
    reader = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    reader.base_layer.weight.zero_()
    before = reader.lora_A["default"].weight.clone()
    make_up(model, method, batches())
    assert torch.equal(reader.lora_A["default"].weight, before)
    assert not reader.lora_B["default"].weight.any()


def adapted(checkpoint: Checkpoint, recipe: TrainRecipe) -> tuple[Any, Method]:
    """The PEFT model of a base that is measured on the batches of this file, and its method."""
    base = load_base(checkpoint, recipe, torch.float32)
    measured = calibrate(base, checkpoint.family, 2, batches(), rotate="energy")
    return adapt(base, checkpoint.family, recipe, {"hidden": 48}, 24, measured)


def normed(model: Any, norms: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of every norm for the real tokens of a batch in one pass of the whole model, float64."""
    found: dict[str, Tensor] = {}
    real, base = batch["attention_mask"].bool(), model.get_base_model()

    def listen(name: str) -> RemovableHandle:
        return base.get_submodule(name).register_forward_hook(
            lambda _m, _i, output: found.__setitem__(name, output[real].double())
        )

    handles = [listen(name) for name in norms]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_every_reader_gets_the_least_squares_of_the_models_own_passes(
    model_type: str, rows: Path, tmp_path: Path
) -> None:
    """The slow way: both whole models run, and normal equations solved in float64 for each reader.

    The compensated model's pass shows each norm the inputs that its readers were compensated for, since a reader
    changes nothing that comes before it.
    """
    used = {"sliding_window": 16} if model_type == "mistral" else {}
    checkpoint = open_checkpoint(str(save_tiny_family(tmp_path / "base", model_type, head_dim=32, **used)))
    # The adapter has full rank, so nothing is left to an approximation.
    recipe = tiny_recipe(checkpoint.folder, rows, lora_head=True, lora_rank=48, **CUT)
    model, method = adapted(checkpoint, recipe)
    method.on_step(0)
    make_up(model, method, batches())
    model.eval()
    base, kept = model.get_base_model(), method.kept_channels()
    inner, head = branches(checkpoint.family, 2)
    assert len(inner) == 4
    readers = {reader: branch.norm for branch in [*inner, head] for reader in branch.readers}
    norms = sorted(set(readers.values()))
    with model.disable_adapter(), method.disabled():
        dense = [normed(model, norms, batch) for batch in batches()]
    cut = [normed(model, norms, batch) for batch in batches()]
    for name, norm in readers.items():
        x, z = torch.cat([of[norm] for of in dense]), torch.cat([of[norm] for of in cut])[:, kept]
        second = z.T @ z
        reader = base.get_submodule(name)
        weight = reader.base_layer.weight.double()
        lacks = weight @ x.T @ z - weight[:, kept] @ second
        power = second.diagonal()
        second += RIDGE * power.mean() * torch.eye(len(kept))
        lacks = lacks @ second.inverse()
        added = (reader.lora_B["default"].weight @ reader.lora_A["default"].weight).double() * reader.scaling["default"]
        root = torch.linalg.cholesky(second)
        assert float(((added[:, kept] - lacks) @ root).norm() / (lacks @ root).norm()) < 1e-4
        added[:, kept] = 0
        assert not added.any()


@pytest.mark.parametrize("head", [False, True])
def test_cut_model_is_nearer_to_the_dense_one(tiny_base: Path, rows: Path, head: bool) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    recipe = tiny_recipe(tiny_base, rows, lora_head=head, **CUT)
    torch.manual_seed(0)
    model, method = adapted(checkpoint, recipe)
    method.on_step(0)
    model.eval()

    @torch.no_grad()
    def distance() -> float:
        """Mean KL in nats from the dense model's predictions to the cut model's."""
        total = 0.0
        for batch in batches():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with model.disable_adapter(), method.disabled():
                dense = model(**inputs).logits.log_softmax(-1)
            cut = model(**inputs).logits.log_softmax(-1)
            total += float((dense.exp() * (dense - cut)).sum(-1)[batch["attention_mask"].bool()].mean())
        return total

    before = distance()
    make_up(model, method, batches())
    after = distance()
    assert after < (0.8 if head else 0.95) * before


def test_run_with_a_trained_head_exports_exactly(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    start(tiny_recipe(base, rows, compensate=True, lora_head=True, hio_rank=0, **CUT), tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "pruned")
    assert exported.parity is not None
    assert exported.parity.max_abs_over_std < 1e-4


def test_head_that_stays_tied_takes_no_adapter(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="stays tied"):
        start(tiny_recipe(base, rows, lora_head=True), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "cut", "mask_start": "zero"}, "needs mask_start"),
        ({"compensate": True, "gate": "anneal"}, "gate cut"),
        ({"mask_start": "gradient", "rotate": "loss"}, "rotate none"),
        ({"mask_start": "gradient", "quantize_base": "nf4"}, "mask_start energy"),
        ({"compensate": True, "quantize_base": "nf4"}, "no compensate"),
    ],
)
def test_options_that_contradict_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainRecipe.build({"model": "m", "data": "d", **settings}, "flags")
