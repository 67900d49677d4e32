"""Training on the kept channels alone is training the wide masked model: the same losses, in the end the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import ChangedInput
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import METHODS
from pat_serve.training.model.calibration import Calibration
from pat_serve.training.model.insert import adapt
from pat_serve.training.model.slicing import slice_model
from pat_serve.training.presets import PAPER
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe, write_rows
from tests.random_runs import PROMPT
from tests.tiny_models import save_tiny_family

DEFAULTS = {name: TrainRecipe.model_fields[name].default for name in (*PAPER, "hio_rank")}
# Dropout draws other numbers for other widths.
SHORT: dict[str, Any] = {
    **DEFAULTS,
    "max_steps": 12,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "report_to": (),
    "logging_steps": 1,
    "save_steps": 100,
    "lora_dropout": 0.0,
}
# A large eps shows a norm that was left with the wide one's.
EPS = {"rms_norm_eps": 1e-2}
BASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama with every bias": ("llama", {"attention_bias": True, "mlp_bias": True, **EPS}, {}),
    "Llama, kept tied": ("llama", {"tie_word_embeddings": True, **EPS}, {"tied_embeddings": "keep"}),
    "Llama, without compensation": ("llama", EPS, {"compensate": False, "rotate": "none"}),
    "Qwen2.5": ("qwen2", EPS, {}),
    "Qwen3, recomputed": ("qwen3", {"head_dim": 32, **EPS}, {"gradient_checkpointing": True}),
    "Gemma": ("gemma", {"head_dim": 32, **EPS}, {}),
    "Phi-3": ("phi3", EPS, {}),
}
# Each trains twice and exports twice; what these add is not left to them alone.
LONG = ("Llama, without compensation", "Qwen3, recomputed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few, since all of them are calibrated on."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows=16)


def losses(run: Path) -> list[list[float]]:
    """Cross-entropy and gradient norm of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["cross_entropy"], line["grad_norm"]] for line in lines if "cross_entropy" in line]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-12/trained.safetensors")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in BASES])
def test_narrow_training_is_wide_training(name: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model_type, config, settings = BASES[name]
    base = save_tiny_family(tmp_path / "base", model_type, **config)
    logits = {}
    for narrow in ("off", "auto"):
        run, out = tmp_path / narrow, tmp_path / f"{narrow}-out"
        start(tiny_recipe(base, rows, **SHORT | settings, narrow=narrow), run)
        done = export_run(run, out)
        assert done.parity is not None
        assert done.parity.max_abs_over_std < 2e-5
        with torch.no_grad():
            logits[narrow] = AutoModelForCausalLM.from_pretrained(out).eval()(PROMPT).logits
    said = capsys.readouterr().err
    assert "trains all 64 channels, since --narrow off" in said
    assert "trains 48 of 64 channels" in said
    wide, narrow = tmp_path / "off", tmp_path / "auto"
    assert losses(narrow) == [pytest.approx(line, rel=1e-4) for line in losses(wide)]
    assert losses(wide)[0][0] != pytest.approx(losses(wide)[-1][0], rel=1e-2), "the training changed nothing"
    assert (logits["auto"] - logits["off"]).abs().max() / logits["off"].std() < 1e-3

    # The saved tensors are as wide as the base, whatever the width in training was.
    ours, reference = (load_file(run / "adapter/adapter_model.safetensors") for run in (narrow, wide))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in reference.items()}
    ours_plan, plan = PruningPlan.load(narrow), PruningPlan.load(wide)
    kept = plan.cuts["hidden"].kept
    assert torch.equal(ours_plan.cuts["hidden"].kept, kept)
    gone = torch.ones(64, dtype=torch.bool).index_fill_(0, kept, False)
    for site, fold in plan.folds.items():
        torch.testing.assert_close(ours_plan.folds[site].scale_D, fold.scale_D, rtol=1e-4, atol=1e-5)
        assert (fold.scale_D[gone] == 1).all()
    # And it was narrow while it was trained: all but the mask's logits, which nothing computes with.
    for key, tensor in trained(narrow).items():
        if key.endswith("scale_D"):
            assert tensor.shape == (48,), key
        if "mlp.gate" in key and "lora_A" in key:
            assert tensor.shape[1] == 48, key


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (DEFAULTS, None),
        (PAPER, "gate closes"),
        ({**DEFAULTS, "gate": "gradual"}, "gate closes"),
        ({**DEFAULTS, "hio_rank": 8}, "mix channels"),
        ({**DEFAULTS, "distillation_weight": 0.5}, None),
        ({**DEFAULTS, "quantize_base": "nf4", "gate": "cut"}, "4-bit"),
        ({**DEFAULTS, "narrow": "off"}, "--narrow off"),
        ({**DEFAULTS, "method": "lora"}, "nothing is cut"),
    ],
)
def test_what_cannot_be_narrowed_stays_wide(settings: dict[str, Any], reason: str | None):
    recipe = TrainRecipe.build({"model": "m", "data": "d", **settings}, "test")
    method = METHODS[recipe.method]
    told = method.stays_wide(recipe.resolved(tied=False, prunes=method.prunes))
    assert (told is None) if reason is None else (told is not None and reason in told)


def test_a_recipe_with_operators_trains_wide_and_exports(
    tiny_base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start(tiny_recipe(tiny_base, rows, **SHORT | {"hio_rank": 8}), tmp_path / "run")
    assert "trains all 64 channels, since its operators mix" in capsys.readouterr().err
    shapes = {tuple(t.shape) for key, t in trained(tmp_path / "run").items() if key.endswith("scale_D")}
    assert shapes == {(64,)}
    assert export_run(tmp_path / "run", tmp_path / "out").parity is not None


def test_a_narrow_run_goes_on_from_its_checkpoint(tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    start(tiny_recipe(tiny_base, rows, **SHORT | {"save_steps": 6, "lora_dropout": 0.05}), run)
    before = {name: (run / name).read_bytes() for name in ("plan.safetensors", "adapter/adapter_model.safetensors")}
    (run / "plan.json").unlink()
    (run / "checkpoints/step-12").rename(tmp_path / "gone")
    resume(run)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_run_that_began_wide_is_not_resumed_narrow(tiny_base: Path, rows: Path, tmp_path: Path):
    """An earlier version began such a run: its inputs do not say how wide it is."""
    run = tmp_path / "run"
    start(tiny_recipe(tiny_base, rows, **SHORT), run)
    (run / "plan.json").unlink()
    inputs = json.loads((run / "inputs.json").read_text())
    del inputs["narrow"]
    (run / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(ChangedInput, match="narrow"):
        resume(run)


def test_a_gain_of_one_is_not_rounded(tiny_base: Path):
    """In bfloat16, f = sqrt(64 / 48) folded into the gains would move every norm by 0.13 % the same way."""
    checkpoint = open_checkpoint(str(tiny_base))
    recipe = TrainRecipe.build({"model": "m", "data": "d"}, "test").resolved(tied=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    norm = base.model.norm
    torch.nn.init.ones_(norm.weight)
    measured = Calibration(importance_D=torch.rand(64), rotation_DD=None)
    model, method = adapt(base, checkpoint.family, recipe, {"hidden": 48}, 24, measured)
    kept = method.kept_channels()
    x = torch.randn(500, 64)
    x[:, torch.ones(64, dtype=torch.bool).index_fill_(0, kept, False)] = 0
    wide = norm(x.bfloat16())[:, kept].float()
    slice_model(model, method, method.cuts())
    ours = norm(x.bfloat16()[:, kept]).float()
    assert float((ours * wide).sum() / wide.square().sum()) == pytest.approx(1, abs=3e-4)
