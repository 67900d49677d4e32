"""A training run from its recipe to a finished run/ folder; also its resumption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from pat_serve.files.atomic import check_vacant
from pat_serve.files.disk import room_on_disk
from pat_serve.run.folder import TENSORBOARD_FOLDER, checkpoint_step, list_checkpoints
from pat_serve.run.plan import file_sha256
from pat_serve.run.replaced import TRAINED, started_files, write_replaced
from pat_serve.training.assemble import Job, assemble
from pat_serve.training.checks.continuation import (
    RunState,
    clear_leftovers,
    require_same_recipe,
    require_unfinished,
    saved_recipe,
    state_of,
)
from pat_serve.training.checks.inputs import day_of
from pat_serve.training.checks.prepare import Prepared, prepare
from pat_serve.training.checks.room import check_disk, way_on
from pat_serve.training.config import TENSORBOARD, TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.choice_file import replaced_weights
from pat_serve.training.model.norms import trained_gains
from pat_serve.training.model.slicing import wide_adapter
from pat_serve.training.ranks import Ranks, snapshot
from pat_serve.training.result import PARITY_ROWS, require_finite, write_result
from pat_serve.training.search.found import Search, as_found, leaves_shape_open, wants_search, with_shape
from pat_serve.training.search.search import search
from pat_serve.training.search.speed import shape_for_speed
from pat_serve.training.sparse.run import prune
from pat_serve.training.start import begin, clear_half_start, lay_out, save_start


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run: its folder, its steps and its sizes."""

    run: Path
    shape: dict[str, int]
    steps: int
    train_loss: float | None


def start(recipe: TrainRecipe, run: Path, *, force: bool = False) -> Finished:
    """Train from the first step.

    Raises:
        OutputExists: `run` is there already, or is no run of ours.
        PatServeError: the model, the data or a setting is unusable. An earlier folder at `run` is untouched.
        DiskFull: the run does not fit on its disk, or another has filled it since; then it can be resumed.
    """
    ranks = Ranks.join()
    recipe = recipe.with_absolute_paths()
    inputs = [Path(recipe.model), *map(Path, filter(None, (recipe.data, recipe.eval_data)))]
    ranks.agree(lambda: check_vacant(run, force=force, inputs=inputs))
    found = _found(recipe, ranks)
    if found is not None:
        recipe = with_shape(recipe, found.shape)
    prepared = prepare(recipe, ranks, ranks.agree(date.today))
    ranks.agree(lambda: check_disk(prepared, run))
    if not method_of(recipe).trains:
        with room_on_disk(run, lambda: way_on(run)):
            begin(prepared, run)
            return _prune(prepared, run)
    if method_of(recipe).searches:
        # A search takes hours with a large model, and writes its scores into the folder.
        with room_on_disk(run, lambda: way_on(run)):
            ranks.agree(lambda: begin(prepared, run))
            job = assemble(prepared, run, ranks, resumes=False)
            ranks.agree(lambda: save_start(job, run))
            return _train(prepared, job, run, ranks, resume_from=None)
    job = assemble(prepared, run, ranks, resumes=False)
    with room_on_disk(run, lambda: way_on(run)):
        ranks.agree(lambda: lay_out(prepared, job, run, found))
        return _train(prepared, job, run, ranks, resume_from=None)


def resume(run: Path) -> Finished:
    """Go on from the last complete checkpoint of an interrupted run, or from its start when there is none yet.

    Raises:
        RunError: not a run, or a finished one.
        ChangedInput: the base, the data or what follows from them is not what the run began with.
    """
    ranks = Ranks.join()
    ranks.agree(lambda: require_unfinished(run))
    prepared = prepare(saved_recipe(run), ranks, day_of(run))
    prepared.inputs.require_unchanged(run)
    ranks.agree(lambda: clear_leftovers(run))
    ranks.agree(lambda: check_disk(prepared, run))
    if not method_of(prepared.recipe).trains:
        with room_on_disk(run, lambda: way_on(run)):
            return _prune(prepared, run)
    lacks_start = method_of(prepared.recipe).searches and ranks.agree(lambda: clear_half_start(run))
    job = assemble(prepared, run, ranks, resumes=True)
    checkpoints = ranks.agree(lambda: list_checkpoints(run))
    with room_on_disk(run, lambda: way_on(run)):
        if lacks_start:
            ranks.agree(lambda: save_start(job, run))
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
            require_same_recipe(run, as_found(recipe, run))
        return state

    state = Ranks.join().agree(look)
    if state is RunState.FINISHED:
        return None
    return resume(run) if state is RunState.UNFINISHED else start(recipe, run, force=True)


def _found(recipe: TrainRecipe, ranks: Ranks) -> Search | None:
    """The shape of a recipe that leaves it open; None for one that says what is cut."""
    if wants_search(recipe):
        return search(recipe)
    return ranks.agree(lambda: shape_for_speed(recipe)) if leaves_shape_open(recipe) else None


def _prune(prepared: Prepared, run: Path) -> Finished:
    prune(prepared, run)
    return Finished(run=run, shape=prepared.inputs.shape, steps=0, train_loss=None)


def _train(prepared: Prepared, job: Job, run: Path, ranks: Ranks, resume_from: Path | None) -> Finished:
    from pat_serve.training.loop.callbacks import LossesSoFar
    from pat_serve.training.loop.reporting import tensorboard_callbacks

    trainer, inputs = job.trainer, prepared.inputs
    if TENSORBOARD in prepared.recipe.report_to:
        done_steps = 0 if resume_from is None else checkpoint_step(resume_from)
        for callback in tensorboard_callbacks(
            run / TENSORBOARD_FOLDER, job.method, writes=ranks.index == 0, done_steps=done_steps
        ):
            trainer.add_callback(callback)
    if resume_from is not None:
        trainer.add_callback(LossesSoFar(trainer.restore_losses, resume_from))
    try:
        if inputs.total_steps:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        job.display.close()
    # A run that is resumed after its last step takes no further one, and its mask must be frozen all the same.
    job.method.on_step(inputs.total_steps)
    _finish(prepared, run, job, ranks)
    loss = trainer.mean_loss if inputs.total_steps else None
    # A method that searches decided over the counts that were asked for.
    shape = job.method.cuts().counts(job.method.base) if job.method.searches else inputs.shape
    return Finished(run=run, shape=shape, steps=inputs.total_steps, train_loss=loss)


def _finish(prepared: Prepared, run: Path, job: Job, ranks: Ranks) -> None:
    method, model = job.method, job.trainer.accelerator.unwrap_model(job.trainer.model)
    # Left to itself, peft also writes the HSMs that sit under the adapted modules. Every rank gathers, rank 0 writes.
    lora = {name: snapshot(tensor) for name, tensor in job.trainer.trained() if ".lora_" in name}
    lora = wide_adapter(lora, method) if method.adapts else {}
    weights = ranks.agree(lambda: _final_weights(prepared, run, job, model))
    plan = replace(method.plan(prepared.inputs.base), weights=weights)
    if prepared.recipe.train_norms:
        plan = replace(plan, norms=trained_gains(model, method))
    ranks.agree(
        lambda: write_result(
            run,
            model=model,
            lora=lora,
            tokenizer=prepared.tokenizer,
            prompts=[example["input_ids"] for example in prepared.data.samples[:PARITY_ROWS]],
            plan=plan,
            end_token_ids=prepared.data.end_token_ids,
        )
    )


def _final_weights(prepared: Prepared, run: Path, job: Job, model: Any) -> dict[str, str]:
    """Hashes of the run's weights in place of the base's: as they began, or as they were trained.

    Raises:
        Diverged: a trained number is not finite.
    """
    if not job.method.adapts:
        merged = job.method.merged(prepared.checkpoint.read)
        return write_replaced(run, (require_finite(run, *tensor) for tensor in merged), TRAINED)
    if not job.ready.trained:
        return {path.name: file_sha256(path) for path in started_files(run)}
    names = dict.fromkeys([*job.ready.replaced, *job.ready.trained])
    tensors = replaced_weights(model, job.method, list(names))
    return write_replaced(run, (require_finite(run, *tensor) for tensor in tensors), TRAINED)
