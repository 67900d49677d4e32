"""A training run from its recipe to a finished run/ folder; also its resumption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pat_serve.atomic import check_vacant, new_folder
from pat_serve.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.geometry import check_width, snap_ratio
from pat_serve.hardware import serving_dtype
from pat_serve.plan import PruningPlan
from pat_serve.progress import say
from pat_serve.run_folder import (
    TENSORBOARD_FOLDER,
    list_checkpoints,
)
from pat_serve.training.config import TrainRecipe
from pat_serve.training.continuation import (
    RunState,
    clear_leftovers,
    require_same_recipe,
    require_unfinished,
    saved_recipe,
    state_of,
)
from pat_serve.training.data import PadBatch, encode_rows, load_rows, load_tokenizer
from pat_serve.training.inputs import RunInputs, examples_sha256
from pat_serve.training.methods import METHODS, Method
from pat_serve.training.ranks import Ranks, sharded_by_fsdp, snapshot, use_one_device
from pat_serve.training.result import write_result

if TYPE_CHECKING:
    from pat_serve.training.callbacks import Display
    from pat_serve.training.trainer import PruningTrainer

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
        OutputExists: `run` is there already, or is no run of ours.
        PatServeError: the model, the data or a setting is unusable. What stood at `run` stands there still.
    """
    ranks = Ranks.join()
    recipe = recipe.with_absolute_paths()
    ranks.agree(lambda: check_vacant(run, force=force, inputs=[Path(recipe.model), Path(recipe.data)]))
    prepared = _prepare(recipe, ranks)
    job = _assemble(prepared, run)
    ranks.agree(lambda: _lay_out(prepared, run))
    return _train(prepared, job, run, ranks, resume_from=None)


def resume(run: Path) -> Finished:
    """Go on from the last complete checkpoint of an interrupted run, or from its start when there is none yet.

    Raises:
        RunError: not a run, or a finished one.
        ChangedInput: the base, the data or what follows from them is not what the run began with.
    """
    ranks = Ranks.join()
    ranks.agree(lambda: require_unfinished(run))
    prepared = _prepare(saved_recipe(run), ranks)
    prepared.inputs.require_unchanged(run)
    job = _assemble(prepared, run)
    ranks.agree(lambda: clear_leftovers(run))
    checkpoints = ranks.agree(lambda: list_checkpoints(run))
    return _train(prepared, job, run, ranks, resume_from=checkpoints[-1] if checkpoints else None)


def start_or_resume(recipe: TrainRecipe, run: Path) -> Finished | None:
    """Start a run that is not there, go on with an unfinished one of the same recipe, leave a finished one alone.

    Returns:
        what the run came to; None when it had finished before.

    Raises:
        OutputExists: `run` is something else.
        UsageError: the run began with other settings.
    """
    recipe = recipe.with_absolute_paths()

    def look() -> RunState:
        state = state_of(run)
        if state is not RunState.ABSENT:
            require_same_recipe(run, recipe)
        return state

    state = Ranks.join().agree(look)
    if state is RunState.FINISHED:
        return None
    return resume(run) if state is RunState.UNFINISHED else start(recipe, run, force=True)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    recipe: TrainRecipe
    checkpoint: Checkpoint
    tokenizer: Any
    examples: list[dict[str, list[int]]]
    inputs: RunInputs


@dataclass(frozen=True, kw_only=True)
class _Job:
    trainer: PruningTrainer
    method: Method
    display: Display


def _lay_out(prepared: _Prepared, run: Path) -> None:
    """Make the run's folder; it appears with recipe and inputs in it, so from then on the run can be resumed."""
    with new_folder(run) as staging:
        prepared.inputs.save(staging)
        prepared.recipe.save(staging)


def _prepare(recipe: TrainRecipe, ranks: Ranks) -> _Prepared:
    """Check everything that can be checked before the model is loaded."""
    if recipe.method not in METHODS:
        raise UsageError("--method", expected=" or ".join(METHODS), found=recipe.method, fix="Choose one of them.")
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    target_width = _target_width(recipe, checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    rows = load_rows(recipe.data, recipe.data_split, tokenizer)
    examples, dropped = encode_rows(rows, tokenizer, recipe.max_length_tokens)
    if dropped:
        say(f"{dropped} of {len(rows)} rows left out: their prompt alone fills {recipe.max_length_tokens} tokens")
    batch = recipe.batch_size * recipe.gradient_accumulation_steps * ranks.count
    total_steps = recipe.max_steps or max(1, round(recipe.epochs * len(examples) / batch))
    if METHODS[recipe.method].prunes and total_steps < LEAST_STEPS:
        raise UsageError(
            "--max-steps" if recipe.max_steps else "--epochs",
            expected=f"at least {LEAST_STEPS} optimizer steps, for the gate's schedule",
            found=f"{total_steps} ({len(examples)} examples in batches of {batch})",
            fix="Train longer, or use smaller batches.",
        )
    dtype = serving_dtype(recipe.dtype)
    inputs = RunInputs(
        base=checkpoint.reference(),
        examples_sha256=examples_sha256(examples),
        total_steps=total_steps,
        target_width=target_width,
        processes=ranks.count,
        # An older GPU serves in float16, which cannot be trained in without scaling the loss.
        dtype="float32" if dtype == "float16" else dtype,
    )
    return _Prepared(recipe=recipe, checkpoint=checkpoint, tokenizer=tokenizer, examples=examples, inputs=inputs)


def _target_width(recipe: TrainRecipe, checkpoint: Checkpoint) -> int:
    if not METHODS[recipe.method].prunes:
        if recipe.ratio is not None or recipe.hidden_size is not None:
            raise UsageError(
                "--ratio" if recipe.ratio is not None else "--hidden-size",
                expected=f"none, since --method {recipe.method} keeps the base's width",
                found=str(recipe.ratio or recipe.hidden_size),
                fix="Leave it out, or choose a method that prunes.",
            )
        return checkpoint.hidden_size
    shape = (checkpoint.hidden_size, checkpoint.num_attention_heads)
    rule = checkpoint.family.hidden_multiple_of_heads
    if recipe.hidden_size is not None:
        return check_width(recipe.hidden_size, *shape, hidden_multiple_of_heads=rule)
    ratio = 0.25 if recipe.ratio is None else recipe.ratio
    width, snapped = snap_ratio(ratio, *shape, hidden_multiple_of_heads=rule)
    if snapped:
        exact = (1 - ratio) * checkpoint.hidden_size
        cut = 1 - width / checkpoint.hidden_size
        say(
            f"--ratio {ratio} asks for a hidden_size of {exact:g}; {width} is the nearest legal and fast one, "
            f"a cut of {cut:.1%} (--hidden-size takes any legal one)"
        )
    return width


def _assemble(prepared: _Prepared, run: Path) -> _Job:
    """Model, method and trainer, ready for the first step."""
    from transformers import TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pat_serve.training.callbacks import Display, MethodClock, MetricsFile
    from pat_serve.training.insert import build_model
    from pat_serve.training.trainer import PruningTrainer

    recipe, inputs = prepared.recipe, prepared.inputs
    dtype = getattr(torch, inputs.dtype)
    set_seed(recipe.seed)
    model, method = build_model(prepared.checkpoint, recipe, dtype, inputs.target_width, inputs.total_steps)
    arguments = TrainingArguments(
        output_dir=str(run.parent),  # made at once, while checkpoints go where the trainer says
        max_steps=inputs.total_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.resolved_warmup_steps(inputs.total_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        # FSDP would also cast what is trained: masks and scales, which move by less than bfloat16 can tell.
        bf16=dtype == torch.bfloat16 and not sharded_by_fsdp(),
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        save_steps=recipe.save_steps,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        # The mask's parameter gets no gradient any more once it is frozen.
        ddp_find_unused_parameters=method.prunes,
    )
    if unused := use_one_device(arguments):
        say(f"{unused + 1} GPUs are visible and one is used; `accelerate launch` uses all (docs/scaling.md)")
    display = Display(f"{recipe.method} to hidden_size {inputs.target_width}")
    trainer = PruningTrainer(
        method=method,
        run=run,
        keep_checkpoints=recipe.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        data_collator=PadBatch(),
        callbacks=[
            MethodClock(method),
            MetricsFile(run),
            display,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return _Job(trainer=trainer, method=method, display=display)


def _train(prepared: _Prepared, job: _Job, run: Path, ranks: Ranks, resume_from: Path | None) -> Finished:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    from pat_serve.training.callbacks import LossesSoFar

    trainer, inputs = job.trainer, prepared.inputs
    if ranks.index == 0:
        trainer.add_callback(TensorBoardCallback(SummaryWriter(run / TENSORBOARD_FOLDER)))
    if resume_from is not None:
        trainer.add_callback(LossesSoFar(trainer.restore_losses, resume_from))
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        job.display.close()
    # A run that is resumed after its last step takes no further one, and its mask must be frozen all the same.
    job.method.on_step(inputs.total_steps)
    _finish(prepared, run, job, ranks)
    return Finished(run=run, hidden_size=inputs.target_width, steps=inputs.total_steps, train_loss=trainer.mean_loss)


def _finish(prepared: _Prepared, run: Path, job: _Job, ranks: Ranks) -> None:
    """Write what an export needs; the plan comes last, so that a run with a plan is a finished run."""
    method, model = job.method, job.trainer.accelerator.unwrap_model(job.trainer.model)
    # Left to itself, peft also writes the HSMs that sit under the adapted modules. Every rank gathers, rank 0 writes.
    lora = {name: snapshot(tensor) for name, tensor in job.trainer.trained() if ".lora_" in name}
    folds, axes = method.folds(), method.axes()
    ranks.agree(
        lambda: write_result(
            run,
            model=model,
            lora=lora,
            tokenizer=prepared.tokenizer,
            prompts=[example["input_ids"] for example in prepared.examples[:PARITY_ROWS]],
            plan=PruningPlan(method=method.name, base=prepared.inputs.base, axes=axes, folds=folds),
        )
    )
