"""A training run from its recipe to a finished run/ folder; also its resumption."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pat_serve.atomic import check_vacant, retire
from pat_serve.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import RunError, UsageError
from pat_serve.hardware import serving_dtype
from pat_serve.plan import PLAN_JSON
from pat_serve.run_folder import (
    CHECKPOINTS_FOLDER,
    RECIPE_FILE,
    TENSORBOARD_FOLDER,
    list_checkpoints,
)
from pat_serve.training.config import TENSORBOARD, TrainRecipe
from pat_serve.training.data import PadBatch, TrainingData, load_tokenizer, read_training_data
from pat_serve.training.finish import write_result
from pat_serve.training.inputs import RunInputs
from pat_serve.training.methods import METHODS, Method
from pat_serve.training.width import target_width

if TYPE_CHECKING:
    from pat_serve.training.callbacks import Display
    from pat_serve.training.trainer import PruningTrainer

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
        OutputExists: `run` is there already, or is no run of ours.
        PatServeError: the model, the data or a setting is unusable. What stood at `run` stands there still.
    """
    recipe = recipe.with_absolute_paths()
    check_vacant(
        run, force=force, inputs=[Path(recipe.model), *map(Path, filter(None, (recipe.data, recipe.eval_data)))]
    )
    prepared = _prepare(recipe)
    run.parent.mkdir(parents=True, exist_ok=True)
    retired = retire(run) if run.exists() else None
    try:
        run.mkdir()
        job = _assemble(prepared, run)
        prepared.inputs.save(run)
        recipe.save(run)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        if retired is not None:
            os.replace(retired, run)
        raise
    # From here on an interruption leaves a run that can be resumed.
    if retired is not None:
        shutil.rmtree(retired)
    return _train(prepared, job, run, resume_from=None)


def resume(run: Path) -> Finished:
    """Go on from the last complete checkpoint of an interrupted run, or from its start when there is none yet.

    Raises:
        RunError: not a run, or a finished one.
        ChangedInput: the base, the data or what follows from them is not what the run began with.
    """
    if not (run / RECIPE_FILE).is_file():
        raise RunError(run, expected="a run with recipe.yaml", found="none", fix="Start one with pat-train --out.")
    if (run / PLAN_JSON).is_file():
        raise RunError(run, expected="an unfinished run", found="a finished one", fix="Export it with pat-export.")
    recipe = TrainRecipe.build(TrainRecipe.read(run / RECIPE_FILE), str(run / RECIPE_FILE))
    prepared = _prepare(recipe)
    prepared.inputs.require_unchanged(run)
    checkpoints = list_checkpoints(run)
    return _train(prepared, _assemble(prepared, run), run, resume_from=checkpoints[-1] if checkpoints else None)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    recipe: TrainRecipe
    checkpoint: Checkpoint
    tokenizer: Any
    data: TrainingData
    inputs: RunInputs


@dataclass(frozen=True, kw_only=True)
class _Job:
    trainer: PruningTrainer
    method: Method
    display: Display


def _prepare(recipe: TrainRecipe) -> _Prepared:
    """Check everything that can be checked before the model is loaded."""
    if recipe.method not in METHODS:
        raise UsageError("--method", expected=" or ".join(METHODS), found=recipe.method, fix="Choose one of them.")
    from pat_serve.training.preflight import check_memory
    from pat_serve.training.reporting import check_reporters

    check_reporters(recipe.report_to)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    width = target_width(recipe, checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    data = read_training_data(recipe, tokenizer)
    batch = recipe.batch_size * recipe.gradient_accumulation_steps
    rows = data.rows()
    total_steps = recipe.max_steps or max(1, round(recipe.epochs * (rows or 0) / batch))
    if METHODS[recipe.method].prunes and total_steps < LEAST_STEPS:
        raise UsageError(
            "--max-steps" if recipe.max_steps else "--epochs",
            expected=f"at least {LEAST_STEPS} optimizer steps, for the gate's schedule",
            found=f"{total_steps} ({rows or 'a stream of'} rows in batches of {batch})",
            fix="Train longer, or use smaller batches.",
        )
    dtype = serving_dtype(recipe.dtype)
    # An older GPU serves in float16, which cannot be trained in without scaling the loss.
    dtype = "float32" if dtype == "float16" else dtype
    # Before the base is hashed, which reads all of it.
    check_memory(checkpoint, recipe, dtype, width, total_steps, data.longest_tokens)
    inputs = RunInputs(
        base=checkpoint.reference(),
        examples_sha256=data.train_sha256,
        held_out_sha256=data.held_out_sha256,
        total_steps=total_steps,
        target_width=width,
        dtype=dtype,
    )
    return _Prepared(recipe=recipe, checkpoint=checkpoint, tokenizer=tokenizer, data=data, inputs=inputs)


def _assemble(prepared: _Prepared, run: Path) -> _Job:
    """Model, method and trainer, ready for the first step."""
    from transformers import TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pat_serve.training.callbacks import Display, MethodClock, MetricsFile
    from pat_serve.training.insert import build_model
    from pat_serve.training.reporting import tensorboard_callbacks
    from pat_serve.training.trainer import PruningTrainer

    recipe, inputs = prepared.recipe, prepared.inputs
    dtype = getattr(torch, inputs.dtype)
    set_seed(recipe.seed)
    model, method = build_model(prepared.checkpoint, recipe, dtype, inputs.target_width, inputs.total_steps)
    arguments = TrainingArguments(
        output_dir=str(run / CHECKPOINTS_FOLDER),
        max_steps=inputs.total_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.resolved_warmup_steps(inputs.total_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_steps=recipe.save_steps,
        eval_strategy="steps" if prepared.data.held_out is not None else "no",
        eval_steps=recipe.eval_steps,
        per_device_eval_batch_size=recipe.batch_size,
        # Every process reads a stream by itself.
        accelerator_config={"dispatch_batches": False} if recipe.streaming else None,
        report_to=[name for name in recipe.report_to if name != TENSORBOARD],
        run_name=run.name,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    display = Display(f"{recipe.method} to {inputs.target_width}")
    trainer = PruningTrainer(
        method=method,
        run=run,
        keep_checkpoints=recipe.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.held_out,
        data_collator=PadBatch(),
        callbacks=[
            MethodClock(method),
            MetricsFile(run),
            *(tensorboard_callbacks(run / TENSORBOARD_FOLDER, method) if TENSORBOARD in recipe.report_to else ()),
            display,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return _Job(trainer=trainer, method=method, display=display)


def _train(prepared: _Prepared, job: _Job, run: Path, resume_from: Path | None) -> Finished:
    trainer, inputs = job.trainer, prepared.inputs
    try:
        outcome = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        job.display.close()
    # A run that is resumed after its last step takes no further one, and its mask must be frozen all the same.
    job.method.on_step(inputs.total_steps)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        prompts = [example["input_ids"] for example in prepared.data.samples]
        write_result(run, model, job.method, inputs.base, prepared.tokenizer, prompts)
    return Finished(
        run=run, hidden_size=inputs.target_width, steps=inputs.total_steps, train_loss=outcome.training_loss
    )
