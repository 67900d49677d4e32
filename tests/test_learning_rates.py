"""`--lr-scale`: which parameters a group names, what their rates are over a run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from pat_serve.cli.train import train
from pat_serve.errors import UsageError
from pat_serve.training.api import PatConfig
from pat_serve.training.config import TrainRecipe
from pat_serve.training.groups import groups_of, rate_factor
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe, write_rows
from tests.test_api import stock_trainer
from tests.test_recipe_defaults import DEFAULTS
from tests.test_resume import interrupt

SCALES = {"lora_b": 4.0, "head": 3.0, "hsm": 0.5}
LAYER = "base_model.model.model.layers.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{LAYER}.mlp.up_proj.lora_A.default.weight", {"lora_a"}),
        (f"module.{LAYER}.self_attn.o_proj.lora_B.default.weight", {"lora_b"}),
        ("base_model.model.lm_head.lora_B.default.weight", {"lora_b", "head"}),
        (f"{LAYER}.self_attn.o_proj.hsm.scale_D", {"hsm"}),
        (f"{LAYER}.input_layernorm.weight", {"norms"}),
        ("base_model.model.model.norm.weight", {"norms"}),
        (f"{LAYER}.mlp.up_proj.weight", {"weights"}),
        ("base_model.model.lm_head.weight", {"weights", "head"}),
        ("base_model.model.model.embed_tokens.weight", {"weights"}),
    ],
)
def test_a_parameters_groups_follow_from_its_name(name: str, expected: set[str]) -> None:
    assert groups_of(name) == expected


def test_factors_of_several_groups_multiply() -> None:
    assert rate_factor("base_model.model.lm_head.lora_B.default.weight", SCALES) == 12
    assert rate_factor("base_model.model.lm_head.lora_A.default.weight", SCALES) == 3
    assert rate_factor(f"{LAYER}.mlp.up_proj.lora_A.default.weight", SCALES) == 1


def recipe(**settings: Any) -> TrainRecipe:
    return TrainRecipe.build({"model": "m", "data": "d"} | settings, "flags")


@pytest.mark.parametrize(
    ("scales", "named"),
    [
        (["lora_c=2"], "'lora_c' is none"),
        (["mask=2"], "mask_learning_rate"),
        (["lora_b"], "group=factor"),
        (["lora_b=2", "lora_b=3"], "one factor for lora_b"),
        (["lora_b=fast"], "lr_scale.lora_b"),
        (["lora_b=0"], "lr_scale.lora_b"),
        ({"lora_b": float("inf")}, "lr_scale.lora_b"),
    ],
)
def test_what_is_no_factor_of_a_group_is_refused(scales: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        recipe(lr_scale=scales)


@pytest.mark.parametrize(
    ("settings", "prunes"),
    [
        ({"lr_scale": {"head": 2}, "lora_head": False}, True),
        ({"lr_scale": {"head": 2}, "method": "lora"}, False),
        ({"lr_scale": {"hsm": 2}, "method": "lora"}, False),
        ({"lr_scale": {"norms": 2}}, True),
    ],
)
def test_a_group_with_nothing_to_train_is_refused(settings: dict[str, Any], prunes: bool) -> None:
    with pytest.raises(UsageError, match=f"--lr-scale: .*found {next(iter(settings['lr_scale']))}"):
        recipe(**settings).resolved(tied=False, prunes=prunes)
    recipe(lr_scale={"lora_a": 0.5, "lora_b": 2}, method="lora").resolved(tied=False, prunes=False)


@pytest.mark.parametrize(
    ("settings", "factors", "own_rates"),
    [
        # Cut down to its kept channels; and with a mask that has its own rate.
        ({**DEFAULTS, "lr_scale": SCALES}, {1.0, 4.0, 3.0, 12.0, 0.5}, 0),
        ({"lr_scale": {"lora_b": 4.0}}, {1.0, 4.0}, 1),
    ],
    ids=["default", "paper"],
)
def test_every_group_follows_the_schedule_and_a_resumed_run_goes_on_with_it(
    settings: dict[str, Any], factors: set[float], own_rates: int, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    asked = tiny_recipe(tiny_base, rows, max_steps=12, learning_rate=1e-3, **settings)
    start(asked, tmp_path / "whole")
    interrupt(tmp_path / "run", asked, 6)
    resume(tmp_path / "run")
    for file in ("plan.safetensors", "adapter/adapter_model.safetensors"):
        ours, reference = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert all(torch.equal(ours[key], tensor) for key, tensor in reference.items()), file

    state = torch.load(tmp_path / "run/checkpoints/step-8/optimizer.pt", weights_only=True)
    mask = [group for group in state["param_groups"] if group["own_rate"]]
    assert [len(group["params"]) for group in mask] == [1] * own_rates
    assert all(group["lr"] == group["initial_lr"] for group in mask)
    scheduled = {group["initial_lr"]: group for group in state["param_groups"] if not group["own_rate"]}
    assert {round(rate / 1e-3, 6) for rate in scheduled} == factors
    shares = [group["lr"] / rate for rate, group in scheduled.items()]
    assert shares == [pytest.approx(shares[0])] * len(shares)
    assert 0 < shares[0] < 1
    # The B of seven linears in each of two layers.
    assert len(scheduled[4e-3]["params"]) == 14


def test_a_larger_rate_moves_its_group_further(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """The head's B starts at zero without compensation, and Adam's first steps are as long as the rate."""
    norms = {}
    for factor in (1.0, 8.0):
        run = tmp_path / str(factor)
        settings = {**DEFAULTS, "compensate": False, "lr_scale": {"head": factor}, "learning_rate": 1e-4}
        start(tiny_recipe(tiny_base, rows, max_steps=12, **settings), run)
        adapter = load_file(run / "adapter/adapter_model.safetensors")
        norms[factor] = [
            float(adapter[f"base_model.model.{name}.lora_B.weight"].norm())
            for name in ("lm_head", "model.layers.0.mlp.up_proj")
        ]
    head, other = (norms[8.0][at] / norms[1.0][at] for at in (0, 1))
    assert 6 < head < 10
    assert 0.9 < other < 1.1


def test_a_stock_trainer_takes_the_groups(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    config = PatConfig(preset="paper", hio_rank=8, lr_scale={"lora_b": 4.0})
    trainer = stock_trainer(tiny_base, rows, tmp_path, config, max_steps=12, gradient_accumulation_steps=1)
    seen: list[dict[str, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
        def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            wanted = ("lora_A", "lora_B", "hsm", "pat_mask")
            named = [(part, name, p) for name, p in trainer.model.named_parameters() for part in wanted if part in name]
            seen.append({part: rates[id(p)] for part, _, p in named})

    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 12
    assert all(rate["lora_B"] == pytest.approx(4 * rate["lora_A"]) for rate in seen)
    assert all(rate["hsm"] == rate["lora_A"] for rate in seen)
    assert {rate["pat_mask"] for rate in seen} == {0.5 / 4}
    assert len({rate["lora_A"] for rate in seen}) > 6


def test_flags_reach_the_recipe(tiny_base: Path, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    rows = write_rows(tmp_path / "rows.jsonl", rows=8)
    app = typer.Typer()
    app.command()(train)
    command = ["--model", str(tiny_base), "--data", str(rows), "--out", str(tmp_path / "run"), "--max-steps", "12"]
    scales = ["--lr-scale", "lora_b=16", "--lr-scale", "head=3"]
    done = CliRunner().invoke(app, [*command, *scales, "--batch-size", "4", "--gradient-accumulation-steps", "1"])
    assert done.exit_code == 0, done.exception
    kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert kept["lr_scale"] == {"lora_b": 16.0, "head": 3.0}
    assert TrainRecipe.build(kept, "recipe.yaml").lr_scale == {"lora_b": 16.0, "head": 3.0}
