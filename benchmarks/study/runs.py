"""One run of the study: trained, exported and measured, as one or two lines of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.exported import export, train_and_export
from benchmarks.study import measuring
from benchmarks.study.methods import ALIGNED, DENSE, Job, settings
from pat_serve.errors import Diverged
from pat_serve.machine.hardware import describe

Line = dict[str, Any]


def run(out: Path, job: Job, steps: int, base_width: int, part: str | None = None) -> list[Line]:
    """Train, export and measure one job.

    Args:
        out: the study's folder, with base/ and data/, and the dense model that speed is measured against.
        job: what to run.
        steps: optimizer steps.
        base_width: D.
        part: of the runs that go side by side; each has a folder of its own for what it makes, and measures no speed.

    Returns:
        its line, and of a run whose writers have masks of their own that of the model with its masks aligned.
    """
    from benchmarks.study.separate_masks import SeparateMasks, align
    from pat_serve.training.methods import METHODS

    register()
    width = None if job.dense else round(base_width * (1 - job.ratio))
    inputs = {
        "model": str(out / "base"), "data": str(out / "data" / "tune.jsonl"), "max_steps": steps, "seed": job.seed,
    }  # fmt: skip
    recipe = settings(job, width) | inputs
    own = out if part is None else out / part
    own.mkdir(exist_ok=True)
    # Speed is measured against the first of the dense models alone, and no part measures speed.
    reference = (job.name, job.seed) == (DENSE, 0) and part is None
    trained, exported = own / "run", (out / "dense" if reference else own / "exported")
    method = METHODS[str(recipe.get("method", "pat"))]
    if issubclass(method, SeparateMasks):
        SeparateMasks.scores = scores_of(recipe, job.name)
    head = {"method": job.name, "ratio": job.ratio, "seed": job.seed, "steps": steps}
    try:
        facts = train_and_export(recipe, job.name, trained, exported)
    except Diverged as error:
        # That is a result, and the others' runs go on.
        return [head | {"diverged": str(error), "machine": describe()}]

    def line(name: str, facts: dict[str, Any]) -> Line:
        figures = measuring.quality(exported, out / "data") | measuring.course(trained)
        # Side by side they would time each other.
        speed = {} if job.dense or part else measuring.speedup(out / "dense", exported)
        return head | {"method": name, **facts, **figures, "machine": describe(), **speed}

    if not issubclass(method, SeparateMasks):
        return [line(job.name, facts)]
    lines = [line(job.name, facts | {"nonzero_parameters": measuring.nonzero_parameters(exported)})]
    assert width is not None
    if facts["hidden_size"] != width:
        align(trained, own / "aligned", width, SeparateMasks.scores)
        lines.append(line(job.name + ALIGNED, export(own / "aligned", exported)))
    return lines


def register() -> None:
    """Make the study's own methods known to the trainer."""
    from benchmarks.study.dense_operator import DensePat
    from benchmarks.study.separate_masks import AlignedMasks, OneMask, SeparateMasks, UnevenMasks
    from pat_serve.training.methods import METHODS

    for method in (DensePat, SeparateMasks, OneMask, UnevenMasks, AlignedMasks):
        METHODS[method.name] = method


def scores_of(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The writers' scores on the very rows, and in the very axes, that the run will calibrate on."""
    from transformers import AutoModelForCausalLM

    from benchmarks.study.separate_masks import writer_scores
    from pat_serve.training.checks.prepare import prepare
    from pat_serve.training.config import TrainRecipe
    from pat_serve.training.model.calibration import calibrate, calibration_batches, rows_at_once
    from pat_serve.training.ranks import Ranks

    prepared = prepare(TrainRecipe.build(recipe, name), Ranks.join())
    family, layers = prepared.checkpoint.family, prepared.checkpoint.num_layers
    base = AutoModelForCausalLM.from_pretrained(prepared.checkpoint.folder, local_files_only=True)
    # Also for a mask that starts undecided, whose run measures nothing.
    batches = calibration_batches(prepared.data.samples, rows_at_once(prepared.recipe))
    rotate = prepared.recipe.rotate
    assert rotate != "auto"
    rotation = None
    if rotate != "none":
        rotation = calibrate(base, family, layers, batches, rotate=rotate).rotation_DD
    return writer_scores(base, family, layers, batches, rotation)
