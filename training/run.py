"""A training run from its recipe to a finished run/ folder; also its resumption."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pat_serve.atomic import check_vacant, new_folder, write_text
from pat_serve.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import RunError, UsageError
from pat_serve.geometry import check_width, snap_ratio
from pat_serve.hardware import serving_dtype
from pat_serve.plan import PLAN_JSON, PruningPlan
from pat_serve.progress import say
from pat_serve.run_folder import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    PARITY_PROMPTS_FILE,
    RECIPE_FILE,
    TENSORBOARD_FOLDER,
    list_checkpoints,
)
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import encode_rows, load_rows
from pat_serve.training.methods import METHODS, Method

PARITY_ROWS = 8
# The schedule's soft phase needs a few steps, and the model some more after the freeze.
LEAST_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run came to."""

    run: Path
    hidden_size: int
    steps: int
    train_loss: float


def start(recipe: TrainRecipe, run: Path, *, force: bool = False) -> Finished:
    """Train from the first step.

    Raises:
        OutputExists: `run` is there already.
        PatServeError: the model, the data or a setting is unusable; nothing has been written then.
    """
    check_vacant(run, force=force)
    prepared = _prepare(recipe)
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)
    recipe.save(run)
    return _train(prepared, run, resume_from=None)


def resume(run: Path) -> Finished:
    """Go on from the last complete checkpoint of an interrupted run, or from its start when there is none yet.

    Raises:
        RunError: not a run, or a finished one.
    """
    if not (run / RECIPE_FILE).is_file():
        raise RunError(run, expected="a run with recipe.yaml", found="none", fix="Start one with pat-train --out.")
    if (run / PLAN_JSON).is_file():
        raise RunError(run, expected="an unfinished run", found="a finished one", fix="Export it with pat-export.")
    recipe = TrainRecipe.build(TrainRecipe.read(run / RECIPE_FILE), str(run / RECIPE_FILE))
    checkpoints = list_checkpoints(run)
    return _train(_prepare(recipe), run, resume_from=checkpoints[-1] if checkpoints else None)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    recipe: TrainRecipe
    checkpoint: Checkpoint
    tokenizer: Any
    examples: list[dict[str, list[int]]]
    target_width: int
    total_steps: int


def _prepare(recipe: TrainRecipe) -> _Prepared:
    """Check everything that can be checked before the model is loaded."""
    from transformers import AutoTokenizer

    if recipe.method not in METHODS:
        raise UsageError("--method", expected=" or ".join(METHODS), found=recipe.method, fix="Choose one of them.")
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    target_width = _target_width(recipe, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    rows = load_rows(recipe.data, recipe.data_split, tokenizer)
    examples, dropped = encode_rows(rows, tokenizer, recipe.max_length_tokens)
    if dropped:
        say(f"{dropped} of {len(rows)} rows left out: their prompt alone fills {recipe.max_length_tokens} tokens")
    batch = recipe.batch_size * recipe.gradient_accumulation_steps
    total_steps = recipe.max_steps or max(1, round(recipe.epochs * len(examples) / batch))
    if METHODS[recipe.method].prunes and total_steps < LEAST_STEPS:
        raise UsageError(
            "--max-steps" if recipe.max_steps else "--epochs",
            expected=f"at least {LEAST_STEPS} optimizer steps, for the gate's schedule",
            found=f"{total_steps} ({len(examples)} examples in batches of {batch})",
            fix="Train longer, or use smaller batches.",
        )
    return _Prepared(
        recipe=recipe,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        examples=examples,
        target_width=target_width,
        total_steps=total_steps,
    )


def _target_width(recipe: TrainRecipe, checkpoint: Checkpoint) -> int:
    if not METHODS[recipe.method].prunes:
        return checkpoint.hidden_size
    shape = (checkpoint.hidden_size, checkpoint.num_attention_heads)
    rule = checkpoint.family.hidden_multiple_of_heads
    if recipe.hidden_size is not None:
        return check_width(recipe.hidden_size, *shape, hidden_multiple_of_heads=rule)
    ratio = 0.25 if recipe.ratio is None else recipe.ratio
    width, snapped = snap_ratio(ratio, *shape, hidden_multiple_of_heads=rule)
    if snapped:
        exact = (1 - ratio) * checkpoint.hidden_size
        say(f"ratio {ratio} asks for a hidden_size of {exact:g}; {width} is the nearest legal and fast one")
    return width


def _train(prepared: _Prepared, run: Path, resume_from: Path | None) -> Finished:
    from torch.utils.tensorboard import SummaryWriter
    from transformers import DataCollatorForSeq2Seq, TrainingArguments, set_seed
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pat_serve.training.callbacks import Display, MethodClock, MetricsFile
    from pat_serve.training.insert import build_model
    from pat_serve.training.trainer import PruningTrainer

    recipe = prepared.recipe
    dtype = getattr(torch, serving_dtype(recipe.dtype))
    set_seed(recipe.seed)
    model, method = build_model(prepared.checkpoint, recipe, dtype, prepared.target_width, prepared.total_steps)
    arguments = TrainingArguments(
        output_dir=str(run / CHECKPOINTS_FOLDER),
        max_steps=prepared.total_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.resolved_warmup_steps(prepared.total_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_steps=recipe.save_steps,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    display = Display(f"{recipe.method} to hidden_size {prepared.target_width}")
    trainer = PruningTrainer(
        method=method,
        run=run,
        keep_checkpoints=recipe.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        data_collator=DataCollatorForSeq2Seq(prepared.tokenizer, padding=True),
        callbacks=[
            MethodClock(method),
            MetricsFile(run),
            TensorBoardCallback(SummaryWriter(run / TENSORBOARD_FOLDER)),
            display,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        display.close()
    if trainer.is_world_process_zero():
        _finish(prepared, run, trainer.accelerator.unwrap_model(trainer.model), method)
    return Finished(
        run=run, hidden_size=prepared.target_width, steps=prepared.total_steps, train_loss=outcome.training_loss
    )


def _finish(prepared: _Prepared, run: Path, model: nn.Module, method: Method) -> None:
    """Write what an export needs; the plan comes last, so that a run with a plan is a finished run."""
    with new_folder(run / ADAPTER_FOLDER, force=True) as staging:
        # Left to itself, peft also writes the HSMs that sit under the adapted modules.
        lora = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
        model.save_pretrained(staging, state_dict=lora, save_embedding_layers=False)  # type: ignore[operator]  # PEFT's
    prepared.tokenizer.save_pretrained(run)
    prompts = [{"token_ids": example["input_ids"]} for example in prepared.examples[:PARITY_ROWS]]
    write_text(run / PARITY_PROMPTS_FILE, "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    PruningPlan(
        method=method.name,
        base=prepared.checkpoint.reference(),
        axes=method.axes(),
        folds=method.folds(),
        adapter=True,
    ).save(run)
