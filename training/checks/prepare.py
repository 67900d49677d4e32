"""Everything of a run that can be checked before its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from torch import Tensor

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import UsageError
from pat_serve.machine.hardware import serving_dtype
from pat_serve.terminal.progress import say
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.training.checks.calibration_rows import require_calibration_rows
from pat_serve.training.checks.cut_report import report_cut
from pat_serve.training.checks.inputs import RunInputs
from pat_serve.training.checks.memory import BatchSize
from pat_serve.training.checks.one_shot import check_walk_memory, require_one_process
from pat_serve.training.checks.preflight import Preflight, check_memory
from pat_serve.training.checks.steps import steps_of_epochs, with_accumulation
from pat_serve.training.checks.width import check_ties, target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import TrainingData, load_tokenizer, read_training_data
from pat_serve.training.data.calibration_samples import FEWEST_ROWS
from pat_serve.training.data.day import DatedTokenizer, writes_the_day
from pat_serve.training.data.rowless import check_vocabulary
from pat_serve.training.loop.reporting import check_reporters
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import calibration_batches, rows_at_once
from pat_serve.training.ranks import Ranks, refuse_zero3, sharded_by_fsdp


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a run will work on.

    Attributes:
        asked: the recipe as it was given, which the run's folder keeps.
        recipe: the same with every `auto` decided.
        vocabulary: the tokenizer's tokens beside the base's rows.
        calibration: padded batches of what the base is measured on; none for a method that does not measure it.
        preflight: the training's size.
    """

    asked: TrainRecipe
    recipe: TrainRecipe
    checkpoint: Checkpoint
    tokenizer: Any
    data: TrainingData
    vocabulary: Vocabulary
    calibration: list[dict[str, Tensor]]
    preflight: Preflight
    inputs: RunInputs


def prepare(recipe: TrainRecipe, ranks: Ranks, day: date | None = None) -> Prepared:
    """Open the base, read the data, check the settings against both.

    Args:
        recipe: as it was given.
        ranks: the processes that train together.
        day: that a chat template is told, if it asks; today by default.

    Raises:
        PatServeError: one of them is unusable.
    """
    check_reporters(recipe.report_to)
    refuse_zero3()
    _refuse_sharded_weights(recipe)
    if not method_of(recipe).trains:
        require_one_process(recipe, ranks)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    named = recipe.with_axes(tied=checkpoint.tied, layers=checkpoint.num_layers)
    if named is not recipe:
        say(
            "--ratio goes along layers and FFN channels, since the base is tied (--axes hidden: along its stream; "
            "--search-minutes 20: what loses least on these data for the time that it saves)"
        )
    # The rate is a number that the run's recipe and card name.
    asked = recipe = named.with_rate(checkpoint.hidden_size)
    method = method_of(recipe)
    if not (recipe.shape or recipe.axes or recipe.ratio or recipe.hidden_size):
        recipe = recipe.model_copy(update={"shape": method.default_shape(checkpoint.sizes)})
    recipe = recipe.resolved(tied=checkpoint.tied, prunes=method.prunes, narrows=HIDDEN in method.axes)
    check_ties(recipe, checkpoint)
    method.check_base(recipe, checkpoint)
    shape = target_shape(recipe, checkpoint)
    report_cut(recipe, checkpoint, shape)
    day = day or date.today()
    tokenizer = load_tokenizer(checkpoint.folder)
    dated: Any = DatedTokenizer(tokenizer, day)
    data = read_training_data(recipe, dated)
    vocabulary = Vocabulary.of(tokenizer, checkpoint.sizes.vocab)
    check_vocabulary(data, vocabulary)
    rows = data.rows()
    asked, recipe = (with_accumulation(one, rows, ranks.count) for one in (asked, recipe))
    accumulation = recipe.gradient_accumulation_steps or 1
    batch = recipe.batch_size * accumulation * ranks.count
    total_steps = recipe.max_steps
    if not method.trains:
        total_steps = 0
    elif total_steps is None:
        total_steps = steps_of_epochs(recipe, rows or 0, ranks.count, accumulation)
    require_calibration_rows(recipe, len(data.samples))
    if recipe.calibration_rows is None:
        recipe = recipe.model_copy(update={"calibration_rows": max(len(data.samples), FEWEST_ROWS)})
    least = method.least_steps(recipe) if method.trains else 0
    untrained = total_steps == 0 and least == 1 and method.prunes
    if total_steps < least and not untrained:
        raise UsageError(
            "--max-steps" if recipe.max_steps is not None else "--epochs",
            expected="at least one optimizer step, since nothing is cut"
            if not method.prunes
            else f"at least {least} optimizer steps, "
            + (f"in which --gate {recipe.gate} closes" if method.follows_writers else f"for --method {method.name}"),
            found=str(total_steps)
            if recipe.max_steps is not None
            else f"{total_steps} ({rows} rows in batches of {batch})",
            fix="Raise it." if recipe.max_steps is not None else "Raise it, or lower --gradient-accumulation-steps.",
        )
    dtype = serving_dtype(recipe.dtype)
    # An older GPU serves in float16, which cannot be trained in without scaling the loss.
    dtype = "float32" if dtype == "float16" else dtype
    looks = method.wants_batches(recipe)
    calibration = calibration_batches(data.samples, rows_at_once(recipe)) if looks else []
    sizes = [BatchSize.of(batch) for batch in calibration]
    # Before the base is hashed, which reads all of it.
    if method.trains:
        preflight = check_memory(checkpoint, recipe, dtype, shape, total_steps, data.longest_tokens, sizes)
    else:
        preflight = check_walk_memory(checkpoint, recipe, dtype, sizes)
    inputs = RunInputs(
        base=checkpoint.reference(),
        examples_sha256=data.train_sha256,
        held_out_sha256=data.held_out_sha256,
        total_steps=total_steps,
        shape=shape,
        day=day.isoformat() if writes_the_day(tokenizer) else None,
        processes=ranks.count,
        dtype=dtype,
        narrow=method.stays_wide(recipe) is None,
        keeps_tie=recipe.keeps_tie,
    )
    return Prepared(
        asked=asked,
        recipe=recipe,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        data=data,
        vocabulary=vocabulary,
        calibration=calibration,
        preflight=preflight,
        inputs=inputs,
    )


def _refuse_sharded_weights(recipe: TrainRecipe) -> None:
    """Under FSDP, where nothing casts weights for a product and no rank has a whole one, LoRA alone is trained.

    Raises:
        UsageError: the recipe trains weights, or a method that merges into them.
    """
    trains_weights = recipe.train != "lora"
    if (trains_weights or not method_of(recipe).adapts) and sharded_by_fsdp():
        raise UsageError(
            f"--train {recipe.train}" if trains_weights else f"--method {recipe.method}",
            expected="one process, DDP or ZeRO-2",
            found="FSDP",
            fix="Take configs/ddp.yaml or zero2.yaml, or --train lora.",
        )
