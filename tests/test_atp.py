"""ATP: the generator's parts, masks that leak while it decides, and runs to a stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.atp.generator import (
    LEAST_RATE,
    DecisionGenerator,
    budget_loss,
    generator_rate,
    noisy_mask,
    top_mask,
)
from pat_serve.training.methods.atp.method import Atp
from pat_serve.training.model.ready import Ready, make_ready
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

SHAPE = {"ffn": 96, "kv_groups": 1}
# This method has none of the settings that `tiny_recipe` makes for PAT.
PLAIN = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "lora_head": None, "hio_rank": None}
PROMPT = torch.randint(3, 380, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=3)


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 380, (2, 6, 24), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


def recipe_of(base: Path, **settings: Any) -> TrainRecipe:
    given = {"model": str(base), "data": "d", "method": "atp", "shape": SHAPE, "lora_rank": 4, "lora_dropout": 0.0}
    return TrainRecipe(**given, **settings).resolved(tied=False, narrows=False)


def ready_of(base: Path, **settings: Any) -> tuple[Ready, Atp]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shape = {"hidden": 64, **SHAPE}
    ready = make_ready(
        model, open_checkpoint(str(base)).family, recipe_of(base, **settings), shape, 20, batches=batches()
    )
    assert isinstance(ready.method, Atp)
    return ready, ready.method


def test_a_drawn_mask_has_the_count_and_a_gradient() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask, soft = noisy_mask(logits, 6, torch.Generator().manual_seed(2))
    assert torch.equal(mask.detach().round().sum(1), torch.full((4,), 6.0))
    (mask * torch.arange(10.0)).sum().backward()
    assert logits.grad is not None
    wanted = torch.arange(10.0) * soft.detach() * (1 - soft.detach()) / 0.4
    assert torch.allclose(logits.grad, wanted, atol=1e-5)
    # Another draw flips some; without noise the largest logits stay.
    other, _ = noisy_mask(logits, 6, torch.Generator().manual_seed(3))
    assert not torch.equal(mask.detach().round(), other.detach().round())
    assert torch.equal(top_mask(logits.detach(), 6).bool(), logits >= logits.topk(6, dim=1).values[:, -1:])


def test_the_budget_is_met_where_the_sigmoids_sum_to_it() -> None:
    weights, counts = {"ffn": 3, "kv_groups": 50}, {"ffn": 6, "kv_groups": 1}
    even = {"ffn": torch.full((4, 10), 0.6), "kv_groups": torch.full((4, 2), 0.5)}
    assert float(budget_loss(even, counts, weights)) == pytest.approx(0.0, abs=1e-6)
    full = {"ffn": torch.ones(4, 10), "kv_groups": torch.ones(4, 2)}
    wanted = torch.log(torch.tensor((30 + 100) / (18 + 50)))
    assert float(budget_loss(full, counts, weights)) == pytest.approx(float(wanted), rel=1e-5)


def test_the_first_decision_is_the_choice(base: Path) -> None:
    ready, method = ready_of(base, choose={"ffn": "energy"})
    for line, cut in method.chosen.items():
        axis, layer = line.split(".")
        assert torch.nonzero(method.masks.values[axis][int(layer)]).flatten().tolist() == cut.kept.tolist()
    # Nothing is cut before the end.
    assert ready.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").weight.shape == (64, 128)


def test_lora_passes_a_mask_while_it_decides_and_not_after(base: Path) -> None:
    ready, method = ready_of(base)
    model: Any = ready.model
    method.masks.leaks = True
    gone = torch.nonzero(method.masks.values["ffn"][1] == 0).flatten()
    with torch.no_grad():
        before = {mode: model.train(mode)(input_ids=PROMPT).logits for mode in (True, False)}
        assert torch.allclose(before[True], before[False], atol=1e-5)
        for name in ("gate_proj", "up_proj"):
            model.get_submodule(f"base_model.model.model.layers.1.mlp.{name}").lora_B["default"].weight[gone] = 0.3
        model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").lora_B["default"].weight[:] = 0.3
        after = {mode: model.train(mode)(input_ids=PROMPT).logits for mode in (True, False)}
    assert not torch.allclose(before[True], after[True], atol=1e-2)
    # Indices that will be cut count for nothing: those that stay see the down projection's change alone.
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.get_submodule(f"base_model.model.model.layers.1.mlp.{name}").lora_B["default"].weight[gone] = -7.0
        assert torch.equal(after[False], model.eval()(input_ids=PROMPT).logits)


def test_the_lasso_sees_what_lora_has_at_removed_indices(base: Path) -> None:
    ready, method = ready_of(base)
    model: Any = ready.model
    mlp = model.get_submodule("base_model.model.model.layers.1.mlp")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.zero_()
        stays, goes = (int(torch.nonzero(method.masks.values["ffn"][1] == keeps)[0]) for keeps in (1, 0))
        nothing = float(method.masks.lasso().detach())
        mlp.up_proj.lora_B["default"].weight[stays] = 5.0
        assert float(method.masks.lasso().detach()) == nothing
        mlp.up_proj.lora_B["default"].weight[goes] = 3.0
        mlp.down_proj.lora_A["default"].weight[:, goes] = 4.0
    assert float(method.masks.lasso().detach()) - nothing == pytest.approx((4 * 9 + 4 * 16) ** 0.5, rel=1e-3)


def test_a_run_ends_as_a_stock_model_and_resumes_to_the_bit(base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"control_share": 0.5, "generator_learning_rate": 0.5}
    recipe = tiny_recipe(base, rows, shape=SHAPE, method="atp", settings=settings, max_steps=8, save_steps=2,
                         keep_checkpoints=4, calibration_rows=8, lora_dropout=0.05, choose={"ffn": "random"},
                         **PLAIN)  # fmt: skip
    start(recipe, run)
    plan = PruningPlan.load(run)
    sizes = open_checkpoint(str(base)).sizes
    assert plan.cuts.counts(sizes) == {"hidden": 64, **SHAPE}
    # The decisions have moved.
    first = load_file(run / "choice.safetensors")
    assert any(not torch.equal(kept, plan.cuts[line].kept) for line, kept in first.items())
    results = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    before = {path: path.read_bytes() for path in results}
    for last in ("step-8", "step-6", "step-4"):
        (run / "checkpoints" / last).rename(tmp_path / last)
    (run / "plan.json").unlink()
    resume(run)
    assert {path: path.read_bytes() for path in results} == before
    export_run(run, tmp_path / "pruned")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert (cut.config.intermediate_size, cut.config.num_key_value_heads) == (96, 1)


def test_channels_that_do_harm_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    downs = [layer.mlp.down_proj.weight for layer in model.model.layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        # Learn some rows by heart with the odd channels alone.
        with torch.no_grad():
            for down in downs:
                down[:, ::2] = 0
        optimizer.zero_grad()
        model(**batches()[step % 2]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        for down in downs:
            down[:, ::2] = torch.randn_like(down[:, ::2]) * 0.3
    model.save_pretrained(base)
    ready = make_ready(
        model,
        open_checkpoint(str(base)).family,
        recipe_of(base, choose={"ffn": "random"}, max_steps=60).model_copy(update={"shape": {"ffn": 64}}),
        {"hidden": 64, "ffn": 64},
        60,
        batches=batches(),
    )
    method = ready.method
    assert isinstance(method, Atp)
    before = [int(mask_I[1::2].sum()) for mask_I in method.masks.values["ffn"]]
    learner = torch.optim.AdamW(method.generator.parameters(), lr=2e-2, weight_decay=0.0)
    for step in range(method.control_steps):
        method.on_step(step)
        learner.step()
    method.on_step(method.control_steps)
    after = [int((method.chosen[f"ffn.{layer}"].kept % 2).sum()) for layer in range(2)]
    assert all(now > then + 8 for then, now in zip(before, after, strict=True)), (before, after)


def test_the_preflight_counts_the_whole_model_and_the_generator(base: Path) -> None:
    checkpoint, recipe = open_checkpoint(str(base)), recipe_of(base)
    estimate = estimate_training(checkpoint, recipe, "float32", {"hidden": 64, **SHAPE}, 20, 24, "cpu")
    _, method = ready_of(base)
    assert estimate.base_parameters == sum(
        t.shape.numel() for t in AutoModelForCausalLM.from_pretrained(base).parameters()
    )
    trained = sum(p.numel() for p in method.generator.parameters() if p.requires_grad)
    assert estimate.method_parameters == trained
    assert estimate.tuned_parameters == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": {"layers": 2}}, "axes of --method atp: ffn, kv_groups"),
        ({"compensate": True}, "none, since --method atp"),
        ({"settings": {"control_share": 1.5}}, "control-share"),
        ({"max_steps": 1}, "at least 2 optimizer steps, for --method atp"),
    ],
)
def test_what_it_cannot_do_is_refused(
    settings: dict[str, Any], message: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        start(tiny_recipe(base, rows, **{"method": "atp", "shape": SHAPE, **PLAIN, **settings}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_short_run_decides_with_a_larger_rate() -> None:
    """At the authors' rate no index changed sides in 80 steps."""
    assert generator_rate(10_000) == LEAST_RATE == 1e-3
    assert generator_rate(10) > generator_rate(40) > LEAST_RATE
    generator = DecisionGenerator(2, {"ffn": 8})
    generator.start_from({"ffn": torch.tensor([[1.0] * 4 + [0.0] * 4] * 2)})
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=generator_rate(40))
    wanted = torch.tensor([[0.0] * 4 + [1.0] * 4] * 2)
    for _ in range(20):
        optimizer.zero_grad()
        logits = generator()["ffn"]
        (logits * (1 - 2 * wanted)).sum().backward()
        optimizer.step()
    assert torch.equal(top_mask(generator()["ffn"].detach(), 4), wanted)
