"""`--train-norms`: the gains move, survive a crash, reach the run's plan, and the export applies them exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.errors import BrokenPlan, ChangedInput
from pat_serve.export.exporter import export_run
from pat_serve.export.parity.masked import load_masked_model
from pat_serve.export.run.reader import open_run
from pat_serve.families.architectures import FAMILIES
from pat_serve.run.plan import PruningPlan
from pat_serve.training import PatConfig, save_run
from pat_serve.training.config import TrainRecipe
from pat_serve.training.presets import PAPER
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe, write_rows
from tests.random_runs import PROMPT
from tests.test_api import stock_trainer
from tests.test_narrow import SHORT, losses
from tests.test_resume import interrupt
from tests.tiny_models import save_tiny_family

NORMS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
NORMS.append("model.norm")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("llama", {}, {}),
    "Llama, wide": ("llama", {}, {"narrow": "off"}),
    "Llama, kept tied": ("llama", {"tie_word_embeddings": True}, {"tied_embeddings": "keep"}),
    "Llama, as published": ("llama", {}, {**PAPER, "hio_rank": 8}),
    "Llama, LoRA": ("llama", {}, {"method": "lora", "hio_rank": None}),
    "Gemma": ("gemma", {"head_dim": 32}, {}),
    "Gemma, as published": ("gemma", {"head_dim": 32}, {**PAPER, "hio_rank": 8}),
    "Qwen3": ("qwen3", {"head_dim": 32}, {}),
}

# Each trains once and exports twice; what these add is not left to them alone.
LONG = ("Llama", "Llama, wide", "Llama, LoRA", "Gemma, as published")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows=16)


def asked(base: Path, rows: Path, **settings: Any) -> TrainRecipe:
    return tiny_recipe(base, rows, **SHORT | {"train_norms": True} | settings)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_the_export_is_the_model_with_its_trained_gains(name: str, rows: Path, tmp_path: Path) -> None:
    model_type, config, settings = CASES[name]
    base = save_tiny_family(tmp_path / "base", model_type, rms_norm_eps=1e-2, **config)
    run, out = tmp_path / "run", tmp_path / "pruned"
    start(asked(base, rows, **settings), run)
    plan = PruningPlan.load(run)
    assert sorted(plan.norms) == sorted(NORMS), "norms over the heads are not trained"
    kept = plan.cuts["hidden"].kept
    stored = load_file(base / "model.safetensors")
    offset = FAMILIES[model_type].norm_offset
    for module, gain in plan.norms.items():
        first = torch.full((64,), 1 - offset) if plan.rotation is not None else stored[f"{module}.weight"]
        assert (gain - first)[kept].abs().max() > 1e-2, module

    done = export_run(run, out)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    walked = export_run(run, tmp_path / "walked", walk=True)
    assert walked.parity is not None
    assert walked.parity.max_abs_over_std < 2e-5

    # The gains are what tells: without them it is another model.
    other = load_masked_model(replace(open_run(run), plan=replace(plan, norms={})), torch.float32)
    with torch.no_grad():
        ours, theirs = (model(PROMPT).logits for model in (AutoModelForCausalLM.from_pretrained(out).eval(), other))
    assert (ours - theirs).abs().max() / ours.std() > 1e-2


def test_narrow_training_is_wide_training_with_gains(rows: Path, tmp_path: Path) -> None:
    """f multiplies a narrow norm's output, so its gain is the wide one's."""
    base = save_tiny_family(tmp_path / "base", "gemma", head_dim=32, rms_norm_eps=1e-2)
    for narrow in ("off", "auto"):
        start(asked(base, rows, narrow=narrow, lr_scale={"norms": 2.0}), tmp_path / narrow)
    assert losses(tmp_path / "auto") == [pytest.approx(line, rel=1e-4) for line in losses(tmp_path / "off")]
    ours, wide = (PruningPlan.load(tmp_path / narrow) for narrow in ("auto", "off"))
    kept = wide.cuts["hidden"].kept
    for module, gain in wide.norms.items():
        torch.testing.assert_close(ours.norms[module][kept], gain[kept], rtol=1e-3, atol=1e-4)
        assert ours.norms[module].shape == (64,)


@pytest.mark.parametrize("settings", [{}, {**PAPER, "hio_rank": 8}], ids=["default", "paper"])
def test_resumed_equals_uninterrupted(settings: dict[str, Any], tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    recipe = asked(tiny_base, rows, save_steps=4, lora_dropout=0.05, lr_scale={"norms": 3.0}, **settings)
    start(recipe, tmp_path / "whole")
    interrupt(tmp_path / "run", recipe, 6)
    resume(tmp_path / "run")
    for file in ("plan.safetensors", "adapter/adapter_model.safetensors"):
        ours, reference = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in reference.items()), file
    saved = load_file(tmp_path / "run/checkpoints/step-8/trained.safetensors")
    assert sum("norm.weight" in name for name in saved) == len(NORMS)


def test_a_bfloat16_base_has_float32_gains_that_no_decay_pulls(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(asked(tiny_base, rows, dtype="bfloat16", weight_decay=0.1, save_steps=8), run)
    saved = load_file(run / "checkpoints/step-8/trained.safetensors")
    gains = {name: tensor for name, tensor in saved.items() if "norm.weight" in name}
    assert {tensor.dtype for tensor in gains.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in gains.values())
    state = torch.load(run / "checkpoints/step-8/optimizer.pt", weights_only=True)
    decays = [(group["weight_decay"], len(group["params"])) for group in state["param_groups"]]
    # The gains and the scales of the five HSMs are near one, not near zero, and do not decay.
    assert [count for decay, count in decays if decay == 0.0] == [len(NORMS) + 5]
    assert {decay for decay, _ in decays} == {0.0, 0.1}
    for dtype in ("float32", "bfloat16"):
        assert export_run(run, tmp_path / dtype, dtype=dtype).parity is not None


def test_a_stock_trainer_trains_them_too(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """And a base weight that is none of them must still be what it was."""
    config = PatConfig(train_norms=True, lr_scale={"norms": 4.0})
    trainer = stock_trainer(tiny_base, rows, tmp_path, config, max_steps=12, gradient_accumulation_steps=1)
    trainer.train()
    run = save_run(trainer.model, tmp_path / "run")
    plan = PruningPlan.load(run)
    assert sorted(plan.norms) == sorted(NORMS)
    assert all((gain - 1).abs().max() > 5e-3 for gain in plan.norms.values())
    assert export_run(run, tmp_path / "pruned").parity is not None
    trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] += 1
    with pytest.raises(ChangedInput, match="up_proj"):
        save_run(trainer.model, tmp_path / "other")


def test_a_plan_of_other_norms_is_refused(rows: Path, tmp_path: Path) -> None:
    base = save_tiny_family(tmp_path / "base", "qwen3", head_dim=32)
    run = tmp_path / "run"
    start(asked(base, rows), run)
    plan = PruningPlan.load(run)
    for norms in ({"model.layers.0.self_attn.q_norm": torch.ones(32)}, {"model.norm": torch.ones(48)}):
        replace(plan, norms=norms).save(run)
        with pytest.raises(BrokenPlan, match="norms over the residual stream"):
            open_run(run)
    replace(plan, norms={"model.norm": torch.full((64,), float("nan"))}).save(run)
    with pytest.raises(BrokenPlan, match=r"finite numbers in norms\.model\.norm"):
        open_run(run)
