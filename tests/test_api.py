"""PAT through a stock Trainer equals PAT through the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from pat_serve.errors import ChangedInput, Diverged, RunError, UnfinishedRun, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training import PatCallback, PatConfig, apply_pat, save_run
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import PadBatch, encode_rows, load_rows, load_tokenizer
from pat_serve.training.presets import PAPER as METHOD
from pat_serve.training.presets import preset_settings
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import tiny_llama

ROOT = Path(__file__).parent.parent
PAPER = PatConfig(preset="paper", hio_rank=8)


class TakeGradient(TrainerCallback):
    """Ends the training before the first optimizer step, with a parameter's gradient."""

    def __init__(self, parameter: torch.nn.Parameter, seen: list[torch.Tensor]) -> None:
        self.parameter = parameter
        self.seen = seen

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self.parameter.grad is not None
        self.seen.append(self.parameter.grad.clone())
        raise KeyboardInterrupt


def stock_trainer(base: Path, rows: Path, out: Path, config: PatConfig | None = None, **overrides: Any) -> Trainer:
    """The same training as `tiny_recipe`'s, with nothing of ours but apply_pat and its callback."""
    settings: dict[str, Any] = {
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,  # 16 micro-batches an epoch: the last step of one has a single one
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "logging_steps": 4,
        "logging_first_step": True,
    }
    set_seed(0)
    tokenizer = load_tokenizer(base)
    examples, _ = encode_rows(load_rows(str(rows), "train", tokenizer), tokenizer, 256)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = apply_pat(model, config or PAPER, calibration=examples)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out / "trainer"), **(settings | overrides)),
        train_dataset=examples,
        eval_dataset=examples[:4],
        data_collator=PadBatch(),
        callbacks=[PatCallback()],
    )


# The rule of thumb gives the published recipe a rank of 8 at this width too.
@pytest.mark.parametrize(
    "config", [PatConfig(preset="paper", hio_rank="auto"), PatConfig()], ids=lambda config: config.preset
)
def test_a_stock_trainer_comes_to_what_the_command_comes_to(
    config: PatConfig, tiny_base: Path, rows: Path, tmp_path: Path
):
    """Gradients are accumulated: a regulariser that counts once a micro-batch would weigh three times too much."""
    recipe = TrainRecipe.build(
        {
            **tiny_recipe(tiny_base, rows, max_steps=16, gradient_accumulation_steps=3).model_dump(
                exclude={*METHOD, "lora_alpha"}
            ),
            **preset_settings(config.preset), "learning_rate": 1e-3, "max_grad_norm": 1.0, "warmup_steps": 1,
            "gradient_accumulation_steps": 3,
            "hio_rank": config.hio_rank,
        },
        "test",
    )  # fmt: skip
    start(recipe, tmp_path / "command")
    trainer = stock_trainer(tiny_base, rows, tmp_path, config)
    trainer.train()
    save_run(trainer.model, tmp_path / "notebook")

    ours, reference = (PruningPlan.load(tmp_path / name) for name in ("notebook", "command"))
    assert ours.base == reference.base
    assert torch.equal(ours.cuts["hidden"].kept, reference.cuts["hidden"].kept)
    for site, fold in reference.folds.items():
        for name, tensor in vars(fold).items():
            torch.testing.assert_close(getattr(ours.folds[site], name), tensor, rtol=1e-3, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "command/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("counted", [True, False])
def test_the_losses_weigh_the_same_at_any_accumulation(counted: bool, tiny_base: Path, rows: Path, tmp_path: Path):
    """The gradient of L0 in the first step comes from the identity loss alone (L1 is zero), so it must not change."""
    gradients = []
    for accumulation in (1, 4):
        trainer = stock_trainer(
            tiny_base, rows, tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=1e9, max_steps=12
        )
        trainer.model_accepts_loss_kwargs = counted
        handle = trainer.model.pat
        seen: list[torch.Tensor] = []
        hsm = handle.method.hsms["model.embed_tokens"]
        trainer.add_callback(TakeGradient(hsm.l0_RD, seen))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        gradients.append(seen[0])
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_mask_has_a_rate_of_its_own_and_no_loss_leaks_into_evaluation(tiny_base: Path, rows: Path, tmp_path: Path):
    trainer = stock_trainer(tiny_base, rows, tmp_path, max_steps=12)
    rates: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            logits = trainer.model.pat.method.mask.logits_D
            group = next(group for group in optimizer.param_groups if any(p is logits for p in group["params"]))
            rates.append({"mask": group["lr"], "others": optimizer.param_groups[0]["lr"]})

    trainer.add_callback(Watch())
    trainer.train()
    assert {rate["mask"] for rate in rates} == {0.5 / 4}
    assert rates[-2]["others"] < rates[2]["others"] <= 1e-3
    batch = PadBatch()(trainer.train_dataset[:4])
    model = trainer.model
    with torch.no_grad():
        evaluated = model.eval()(**batch)
    plain = trainer.model.get_base_model()(**batch)
    assert torch.equal(evaluated.loss, plain.loss)
    trained = model.train()(**batch).loss
    assert trained > evaluated.loss + 0.1


def test_the_example_runs_and_its_result_is_exported(tmp_path: Path):
    script = ROOT / "examples/finetune_in_python.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"pat-export --ckpt {tmp_path}/run --out {tmp_path}/pruned")
    out = export_run(tmp_path / "run", tmp_path / "pruned").out
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 48


def test_an_unfinished_training_is_not_saved(tiny_base: Path, tmp_path: Path):
    model = apply_pat(AutoModelForCausalLM.from_pretrained(tiny_base), PAPER)
    with pytest.raises(UnfinishedRun, match="PatCallback"):
        save_run(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_preset_has_an_old_name_too(tiny_base: Path, capsys: pytest.CaptureFixture[str]):
    model = apply_pat(AutoModelForCausalLM.from_pretrained(tiny_base), PatConfig(recipe="paper", hio_rank=8))
    assert model.pat.recipe.gate == "anneal"
    assert "PatConfig.recipe is now called PatConfig.preset" in capsys.readouterr().err


def test_the_default_recipe_wants_examples(tiny_base: Path):
    with pytest.raises(UsageError, match=r"calibration=examples"):
        apply_pat(AutoModelForCausalLM.from_pretrained(tiny_base))


def test_a_base_that_changed_while_it_was_trained_is_not_saved(tiny_base: Path, rows: Path, tmp_path: Path):
    trainer = stock_trainer(tiny_base, rows, tmp_path, PatConfig(), max_steps=12)
    trainer.train()
    trainer.model.get_base_model().model.layers[1].mlp.up_proj.weight.data[3, 3] += 0.1
    with pytest.raises(ChangedInput, match=r"layers\.1\.mlp\.up_proj\.weight"):
        save_run(trainer.model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_model_is_refused(tiny_base: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] += 0.1
    with pytest.raises(ChangedInput, match=r"layers\.1\.mlp\.up_proj\.weight"):
        apply_pat(model)
    # An export starts from the base's files.
    with pytest.raises(ChangedInput, match="other values"):
        apply_pat(tiny_llama(seed=3), PatConfig(base=str(tiny_base)))
    with pytest.raises(UsageError, match="ratio"):
        apply_pat(AutoModelForCausalLM.from_pretrained(tiny_base), PatConfig(ratio=0.9))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_steps": 5}, UsageError, "at least 12 optimizer steps"),
        ({"label_smoothing_factor": 0.1}, UsageError, "label smoothing"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4},
            UsageError,
            "lr_scheduler_type",
        ),
    ],
)
def test_trainers_that_do_not_fit(
    settings: dict[str, Any], error: type[Exception], message: str, tiny_base: Path, rows: Path, tmp_path: Path
):
    with pytest.raises(error, match=message):
        stock_trainer(tiny_base, rows, tmp_path, **settings).train()


def test_a_resumption_and_a_lost_number_are_refused(tiny_base: Path, rows: Path, tmp_path: Path):
    trainer = stock_trainer(tiny_base, rows, tmp_path)
    trainer.state.global_step = 3
    with pytest.raises(RunError, match="a resumption"):
        PatCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.model.pat.method.hsms["model.embed_tokens"].scale_D.data[0] = torch.nan
    with pytest.raises(Diverged, match="step 1"):
        trainer.train()


def test_importing_the_stage_imports_no_torch():
    script = "import sys, pat_serve.training; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
