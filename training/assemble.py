"""Model, method and trainer of a run, ready for the first step or for a checkpoint to be loaded into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pat_serve.terminal.progress import say, track
from pat_serve.training.checks.prepare import Prepared
from pat_serve.training.config import TENSORBOARD
from pat_serve.training.data import PadBatch
from pat_serve.training.data.rowless import CheckedBatch
from pat_serve.training.methods import Method, method_of
from pat_serve.training.model.calibration import Calibration, calibrate
from pat_serve.training.model.teacher import holds_teacher, load_teacher
from pat_serve.training.ranks import Ranks, sharded_by_fsdp, use_one_device

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from pat_serve.training.loop.callbacks import Display
    from pat_serve.training.loop.trainer import PruningTrainer
    from pat_serve.training.model.ready import Ready


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training that is ready to run."""

    trainer: PruningTrainer
    ready: Ready
    display: Display

    @property
    def method(self) -> Method:
        """The method that prunes the run's model."""
        return self.ready.method


def assemble(prepared: Prepared, run: Path, ranks: Ranks, *, resumes: bool) -> Job:
    """Load the base, put everything into it, and build the trainer.

    Args:
        prepared: the checked inputs.
        run: the run's folder, which is there already only if it is resumed.
        ranks: the processes that train together.
        resumes: the run's own calibration and checkpoints count; otherwise what lies there is about to be replaced.
    """
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pat_serve.training.loop.callbacks import Display, MethodClock, MetricsFile
    from pat_serve.training.loop.trainer import PruningTrainer

    recipe = prepared.recipe
    set_seed(recipe.seed)
    ready = _build(prepared, run, ranks, resumes=resumes)
    method = ready.method
    arguments = _arguments(prepared, run, method)
    if unused := use_one_device(arguments):
        say(f"{unused + 1} GPUs are visible and one is used; `accelerate launch` uses all (docs/scaling.md)")
    told = ", ".join(f"{axis} {count}" for axis, count in prepared.inputs.shape.items())
    display = Display(f"{recipe.method} to {told}")
    trainer = PruningTrainer(
        method=method,
        teacher=load_teacher(prepared.checkpoint, getattr(torch, prepared.inputs.dtype))
        if holds_teacher(recipe)
        else None,
        run=run,
        keep_checkpoints=recipe.keep_checkpoints,
        model=ready.model,
        args=arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.held_out,
        data_collator=CheckedBatch(prepared.vocabulary) if recipe.streaming else PadBatch(),
        callbacks=[MethodClock(method), MetricsFile(run), display],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return Job(trainer=trainer, ready=ready, display=display)


def _build(prepared: Prepared, run: Path, ranks: Ranks, *, resumes: bool) -> Ready:
    from pat_serve.training.model.choice_file import load_earlier
    from pat_serve.training.model.insert import load_base
    from pat_serve.training.model.ready import make_ready

    recipe, inputs, checkpoint = prepared.recipe, prepared.inputs, prepared.checkpoint
    batches = prepared.calibration
    found, wanted = len(prepared.data.samples), recipe.calibration_rows
    assert wanted is not None, "the recipe was not resolved"
    if batches and found < wanted and not resumes:
        say(f"calibration: the data have {found} rows, of {wanted} wanted")
    earlier = load_earlier(run) if resumes else None
    base = load_base(checkpoint, recipe, getattr(torch, inputs.dtype))
    calibration = None
    if method_of(recipe).wants_calibration(recipe):
        # One process measures: all others, and a resumed run, must turn the model by the same matrix, to the bit.
        calibration = ranks.agree(
            lambda: (Calibration.load(run) if resumes else None) or _measure(base, prepared, batches)
        )
    return make_ready(
        base,
        checkpoint.family,
        recipe,
        inputs.shape,
        inputs.total_steps,
        calibration=calibration,
        batches=batches,
        earlier=earlier,
        folder=run if method_of(recipe).searches else None,
    )


def _measure(base: Any, prepared: Prepared, batches: list[dict[str, Tensor]]) -> Calibration:
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    rotate = recipe.rotate
    assert rotate != "auto", "the recipe was not resolved"
    return calibrate(
        base,
        checkpoint.family,
        checkpoint.num_layers,
        track(batches, "calibrate", len(batches)),
        rotate=rotate,
        by_gradient=recipe.mask_start == "gradient",
        keeps_tie=recipe.keeps_tie,
    )


def _arguments(prepared: Prepared, run: Path, method: Method) -> TrainingArguments:
    from transformers import TrainingArguments

    recipe, inputs = prepared.recipe, prepared.inputs
    assert recipe.learning_rate is not None, "the recipe was not resolved"
    assert recipe.gradient_accumulation_steps is not None, "the recipe was not resolved"
    return TrainingArguments(
        output_dir=str(run.parent),  # made at once, while checkpoints go where the trainer says
        # A run of no steps never calls the Trainer's train, but the Trainer refuses a stream with max_steps 0.
        max_steps=max(1, inputs.total_steps),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.resolved_warmup_steps(inputs.total_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        # FSDP would also cast what is trained: masks and scales, which move by less than bfloat16 can tell.
        bf16=inputs.dtype == "bfloat16" and not sharded_by_fsdp(),
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        # `pat-eval law` reads them beside every evaluation.
        include_num_input_tokens_seen="non_padding",
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
        # The parameters that decide over a cut get no gradient once the cut is frozen.
        ddp_find_unused_parameters=method.follows_writers or method.cuts_at_the_end,
    )
