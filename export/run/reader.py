"""Open a finished run: its plan, its base (which must be the one it was trained on) and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.checkpoints.shards import TensorEntry
from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.hybrid import LEAST_SCALE
from pat_serve.errors import BrokenPlan, MissingModel, RunError, UnfinishedRun, first_line
from pat_serve.export.run.adapter import LoraUpdate, read_adapter
from pat_serve.families.architectures import EMBEDDING, FINAL_NORM
from pat_serve.run.folder import ADAPTER_FOLDER, RECIPE_FILE, checkpoint_step, list_checkpoints
from pat_serve.run.plan import PLAN_JSON, PruningPlan, file_sha256
from pat_serve.run.replaced import read_replaced

__all__ = ["LoraUpdate", "Run", "open_run"]

OTHER_BASE = "Give the base's original folder with --base."


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run with everything that an export reads.

    Attributes:
        folder: run/.
        plan: what to replace, turn, fold and cut.
        recipe: of the training.
        base: the model that it began with.
        adapter: LoRA updates by module name.
        replaced: the run's own tensors that take the place of the (turned) base's, by name.
    """

    folder: Path
    plan: PruningPlan
    recipe: dict[str, Any]
    base: Checkpoint
    adapter: Mapping[str, LoraUpdate]
    replaced: Mapping[str, TensorEntry]


def open_run(folder: Path, base_override: str | None = None, *, hash_weights: bool = True) -> Run:
    """Open a run and check that its parts fit together.

    Args:
        folder: run/.
        base_override: where the base lies now, if it was moved since.
        hash_weights: read the base's weight files and compare their hashes; without it `BaseFiles` has to.

    Raises:
        RunError: not a run, or its training has not finished.
        MissingModel: the base is not where it was.
        BrokenPlan: the base is not the one that the run was trained on, or the plan does not fit it.
    """
    _check_finished(folder)
    plan = PruningPlan.load(folder)
    try:
        base = open_checkpoint(base_override or plan.base.source, plan.base.revision)
    except MissingModel as error:
        raise MissingModel(
            error.subject,
            expected="the base model that the run was trained on",
            found=error.found,
            fix="If it was moved, say where with --base.",
        ) from error
    _check_base(plan, base, hash_weights)
    _check_sparsity(plan, base)
    _check_hashes(folder / ADAPTER_FOLDER, plan.adapter, "Copy the run again.")
    adapter = read_adapter(folder / ADAPTER_FOLDER, base, plan.adapter) if plan.adapter else {}
    replaced = read_replaced(folder, plan.weights, base)
    return Run(folder=folder, plan=plan, recipe=_read_recipe(folder), base=base, adapter=adapter, replaced=replaced)


def _check_finished(folder: Path) -> None:
    if (folder / PLAN_JSON).is_file():
        return
    if (folder / RECIPE_FILE).is_file():
        checkpoints = list_checkpoints(folder)
        reached = (
            f"its last checkpoint is step {checkpoint_step(checkpoints[-1])}" if checkpoints else "it has none yet"
        )
        raise UnfinishedRun(
            folder,
            expected="a finished run with plan.json",
            found=f"an unfinished one; {reached}",
            fix=f"Finish it with pat-train --resume {folder}.",
        )
    raise RunError(
        folder,
        expected="a training run with plan.json",
        found="a folder without one" if folder.is_dir() else "no such folder",
        fix="Give the folder that pat-train --out wrote.",
    )


def _check_sparsity(plan: PruningPlan, base: Checkpoint) -> None:
    """Zeros are promised of linears that the export has; how many there are is counted in its files."""
    stays = set(plan.cuts.layers_kept(base.num_layers))
    linears = {name for name, spec, i in base.family.modules(base.num_layers) if spec.lora and i in stays}
    if stray := sorted(set(plan.sparsity) - linears):
        raise BrokenPlan(
            PLAN_JSON,
            expected="sparsity of linears in layers that stay",
            found=f"{plan.sparsity[stray[0]]} for {stray[0]!r:.80}",
            fix="Repeat the training.",
        )


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE_FILE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BrokenPlan(
            path, expected="the run's recipe", found=first_line(error), fix="Copy the run again."
        ) from error
    if not isinstance(recipe, dict):
        raise BrokenPlan(path, expected="the run's recipe", found=type(recipe).__name__, fix="Copy the run again.")
    return recipe


def _check_base(plan: PruningPlan, base: Checkpoint, hash_weights: bool) -> None:
    files = {"config.json", *(path.name for path in base.shards())}
    if set(plan.base.sha256) != files:
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"the SHA-256 of all {len(files)} files of the base in {base.folder}",
            found=f"{len(plan.base.sha256)}, among them not {sorted(files ^ set(plan.base.sha256))[0]!r:.80}",
            fix=OTHER_BASE,
        )
    hashed = plan.base.sha256 if hash_weights else {"config.json": plan.base.sha256["config.json"]}
    _check_hashes(base.folder, hashed, OTHER_BASE)
    plan.cuts.sizes(base.sizes)
    _check_widths(plan, base)
    _check_sites(plan, base)


def _check_widths(plan: PruningPlan, base: Checkpoint) -> None:
    """Operators, rotation and gains are as wide as the base's residual stream."""
    widths = {site: plan.folds[site].l0_RD.shape[1] for site in plan.folds}
    widths |= {"rotation": len(plan.rotation)} if plan.rotation is not None else {}
    for what, width in widths.items():
        if width != base.hidden_size:
            raise BrokenPlan(
                PLAN_JSON,
                expected=f"width {base.hidden_size} of {what}",
                found=f"{width}",
                fix="Repeat the training.",
            )
    norms = {name for name, spec, _ in base.family.modules(base.num_layers) if spec.hidden_norm}
    for name, gain in plan.norms.items():
        if name not in norms or tuple(gain.shape) != (base.hidden_size,):
            raise BrokenPlan(
                PLAN_JSON,
                expected=f"gains of width {base.hidden_size} for norms over the residual stream",
                found=f"{len(gain)} numbers for {name!r:.80}",
                fix="Repeat the training.",
            )


def _check_sites(plan: PruningPlan, base: Checkpoint) -> None:
    """Operators sit where they can be folded, and a tied embedding's where the head can divide by it."""
    fold, kept = plan.folds.get(EMBEDDING), plan.cuts.line(HIDDEN, None, base.sizes).kept
    ranked = fold is not None and fold.rank > 0
    if plan.tied and (not base.tied or plan.rotation is None or FINAL_NORM not in plan.norms or ranked):
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"a tie that a rotation leaves: of a tied base, with a gain for {FINAL_NORM} and no operator of a "
            "rank on the embedding",
            found="another plan that says tied",
            fix="Repeat the training.",
        )
    if base.tied and fold is not None and not fold.rank:
        smallest = float(fold.scale_D[kept].abs().min())
        if smallest < LEAST_SCALE - 1e-6:
            raise BrokenPlan(
                PLAN_JSON,
                expected=f"scales of {LEAST_SCALE} or more on an embedding that stays tied: the head divides by them",
                found=f"{smallest:.3g}",
                fix="Train again with --tied-embeddings untie, or with a lower --learning-rate.",
            )
    sites, found = set(base.family.residual_writers(base.num_layers)), set(plan.folds)
    # Operators of layers that are dropped have nowhere to go; without any at all, the cut is a cut and nothing else.
    dropped = {f"model.layers.{i}." for i in set(range(base.num_layers)) - set(plan.cuts.layers_kept(base.num_layers))}
    wanted = {site for site in sites if not site.startswith(tuple(dropped))} if found else set()
    if found - sites or wanted - found:
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"an operator on each of the {len(wanted)} modules that write to the residual stream, or none",
            found=f"{len(found & wanted)} of them, {len(found - sites)} others",
            fix="Repeat the training.",
        )


def _check_hashes(folder: Path, sha256: Mapping[str, str], fix: str) -> None:
    """Every named file is there, unchanged. Two at a time: a shard is read at the speed of one core's SHA-256."""
    outside = [name for name in sha256 if Path(name).name != name]
    if outside:
        raise BrokenPlan(PLAN_JSON, expected="names of files in one folder", found=f"{outside[0]!r:.80}", fix=fix)
    paths = [folder / name for name in sha256]
    with ThreadPoolExecutor(2) as pool:
        hashes = pool.map(lambda path: file_sha256(path) if path.is_file() else None, paths)
        for path, expected, found in zip(paths, sha256.values(), hashes, strict=True):
            if found != expected:
                pool.shutdown(wait=False, cancel_futures=True)
                raise other_file(path, expected, found, fix)


def other_file(path: Path, expected: str, found: str | None, fix: str) -> BrokenPlan:
    """The error of a file with another SHA-256 than the plan names; None for one that is not there."""
    return BrokenPlan(
        path,
        expected=f"the file of the training (SHA-256 {expected[:12]}...)",
        found="no such file" if found is None else f"{found[:12]}...",
        fix=fix,
    )
