"""Open a finished run: its plan, its base (which must be the one it was trained on) and its adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pat_serve.architectures import EMBEDDING, HEAD, HIDDEN
from pat_serve.checkpoint import Checkpoint, open_checkpoint, read_tensor, tensor_names
from pat_serve.errors import BrokenPlan, MissingModel, RunError, UnfinishedRun, UnsupportedModel, first_line
from pat_serve.hybrid import LEAST_SCALE
from pat_serve.plan import PLAN_JSON, PruningPlan, file_sha256
from pat_serve.run_folder import ADAPTER_FOLDER, RECIPE_FILE, checkpoint_step, list_checkpoints

_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """One module's low-rank update: W + scaling * B A.

    Attributes:
        a_RI: (rank, in).
        b_OR: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run with everything that an export reads."""

    folder: Path
    plan: PruningPlan
    recipe: dict[str, Any]
    base: Checkpoint
    adapter: dict[str, LoraUpdate]


def open_run(folder: Path, base_override: str | None = None) -> Run:
    """Open a run and check that its parts fit together.

    Args:
        folder: run/.
        base_override: where the base lies now, if it was moved since.

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
    _check_base(plan, base)
    _check_hashes(folder / ADAPTER_FOLDER, plan.adapter, "Copy the run again.")
    adapter = _read_adapter(folder / ADAPTER_FOLDER, base) if plan.adapter else {}
    return Run(folder=folder, plan=plan, recipe=_read_recipe(folder), base=base, adapter=adapter)


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


def _check_base(plan: PruningPlan, base: Checkpoint) -> None:
    _check_hashes(base.folder, plan.base.sha256, "Give the base's original folder with --base.")
    cut = plan.axes.get(HIDDEN)
    if cut is None or cut.width != base.hidden_size:
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"a cut of the axis {HIDDEN} of width {base.hidden_size}",
            found="none" if cut is None else f"width {cut.width}",
            fix="Repeat the training.",
        )
    unknown = set(plan.axes) - {HIDDEN}
    if unknown:
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"a cut of {HIDDEN} alone",
            found=f"cuts of {', '.join(sorted(unknown))}",
            fix="This version of pat-export cuts the hidden axis only.",
        )
    fold = plan.folds.get(EMBEDDING)
    if base.tied and fold is not None and not fold.rank:
        smallest = float(fold.scale_D[cut.kept].abs().min())
        if smallest < LEAST_SCALE - 1e-6:
            raise BrokenPlan(
                PLAN_JSON,
                expected=f"scales of {LEAST_SCALE} or more on an embedding that stays tied: the head divides by them",
                found=f"{smallest:.3g}",
                fix="Train again with --tied-embeddings untie, or with a lower --learning-rate.",
            )
    sites = set(base.family.residual_writers(base.num_layers))
    if not cut.is_identity and set(plan.folds) != sites:
        raise BrokenPlan(
            PLAN_JSON,
            expected=f"an operator on each of the {len(sites)} modules that write to the residual stream",
            found=f"{len(plan.folds)} operators",
            fix="Repeat the training.",
        )


def _check_hashes(folder: Path, sha256: dict[str, str], fix: str) -> None:
    for name, expected in sha256.items():
        path = folder / name
        found = file_sha256(path) if path.is_file() else None
        if found != expected:
            raise BrokenPlan(
                path,
                expected=f"the file of the training (SHA-256 {expected[:12]}...)",
                found="no such file" if found is None else f"{found[:12]}...",
                fix=fix,
            )


def _read_adapter(folder: Path, base: Checkpoint) -> dict[str, LoraUpdate]:
    """Read a PEFT LoRA adapter by module name.

    Raises:
        UnsupportedModel: a kind of adapter whose merge is more than W + scaling * B A.
        BrokenPlan: its tensors do not pair up or fit the base.
    """
    from peft import LoraConfig

    weights = folder / "adapter_model.safetensors"
    config = LoraConfig.from_pretrained(str(folder))
    for option, plain in (
        ("use_dora", False),
        ("modules_to_save", None),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("bias", "none"),
        ("fan_in_fan_out", False),
    ):
        value = getattr(config, option)
        if value != plain:
            raise UnsupportedModel(
                folder,
                expected=f"a LoRA adapter with {option}={plain!r}",
                found=f"{option}={value!r}",
                fix="Only W + scaling * B A can be merged exactly here.",
            )
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    tensors = {name: read_tensor(weights, name) for name in tensor_names(weights)}
    modules = _paired_modules(tensors, weights)
    updates = {
        module: LoraUpdate(
            a_RI=tensors[f"{_ADAPTER_PREFIX}{module}.lora_A.weight"],
            b_OR=tensors[f"{_ADAPTER_PREFIX}{module}.lora_B.weight"],
            scaling=scaling,
        )
        for module in modules
    }
    for module, update in updates.items():
        # A tied head that the export unties begins as the embedding.
        entry = base.tensors.get(f"{EMBEDDING if base.tied and module == HEAD else module}.weight")
        shape = (update.b_OR.shape[0], update.a_RI.shape[1])
        if entry is None or entry.shape != shape:
            found = "no such module" if entry is None else f"{shape}"
            raise BrokenPlan(
                weights,
                expected=f"an update of the base's {module}" + (f" of shape {entry.shape}" if entry else ""),
                found=found,
                fix="The adapter belongs to another base.",
            )
    return updates


def _paired_modules(names: Iterable[str], weights: Path) -> list[str]:
    halves: dict[str, set[str]] = {}
    for name in names:
        module, _, half = name.removeprefix(_ADAPTER_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise BrokenPlan(
                weights, expected="LoRA tensors alone", found=f"the tensor {name}", fix="Train with plain LoRA."
            )
        halves.setdefault(module, set()).add(half)
    for module, found in halves.items():
        if len(found) != 2:
            raise BrokenPlan(
                weights, expected=f"lora_A and lora_B of {module}", found=found.pop(), fix="Copy the run again."
            )
    return sorted(halves)
