"""From a trained model to a run/ folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pat_serve.errors import ChangedInput, UnfinishedRun, UsageError
from pat_serve.files.atomic import check_vacant, new_folder
from pat_serve.files.disk import room_on_disk
from pat_serve.run.replaced import write_replaced
from pat_serve.training.api.applied import AppliedPat, applied, frozen_hashes
from pat_serve.training.data import load_tokenizer
from pat_serve.training.model.choice_file import replaced_weights
from pat_serve.training.model.norms import trained_gains
from pat_serve.training.model.slicing import wide_adapter
from pat_serve.training.result import write_result


def save_run(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    prompts: list[list[int]] | None = None,
    force: bool = False,
) -> Path:
    """Write a run/ for `pat-export --ckpt`.

    Args:
        model: from `apply_pat`, trained.
        folder: must not exist, unless `force`.
        tokenizer: the base's own by default.
        prompts: token ids for the export's parity check; rows of the training data by default.
        force: replace an earlier run.

    Raises:
        UnfinishedRun: no Trainer has come to its end, or it ended before the mask was frozen.
        ChangedInput: the base's weights are not those that `apply_pat` left.
        Diverged: a trained weight is not finite.
        OutputExists: the folder is there.
        DiskFull: it does not fit on its disk.
    """
    handle, folder = applied(model), Path(folder)
    still_to_come = handle.method.unfinished()
    if not handle.trained or still_to_come:
        raise UnfinishedRun(
            "the model",
            expected=f"a training beyond {still_to_come}"
            if handle.trained
            else "one that a Trainer has brought to its end",
            found=f"one that ended at step {handle.method.step}" if handle.trained else "one that none has",
            fix="Train to the end, with PatCallback among the Trainer's callbacks.",
        )
    prompts = prompts or handle.samples
    if not prompts:
        raise UsageError("prompts", expected="token ids for the parity check", found="none", fix="Pass some.")
    _require_same_base(model.get_base_model(), handle)
    check_vacant(folder, force=force, inputs=[handle.checkpoint.folder])
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(handle.checkpoint.folder)
    with room_on_disk(folder, lambda: "Free some space, or save elsewhere."), new_folder(folder) as staging:
        handle.recipe.model_copy(update={"max_steps": handle.method.total_steps}).save(staging)
        weights = write_replaced(staging, replaced_weights(model, handle.method, handle.replaced))
        plan = replace(handle.method.plan(handle.checkpoint.reference()), weights=weights)
        if handle.recipe.train_norms:
            plan = replace(plan, norms=trained_gains(model, handle.method))
        lora = {name: tensor.cpu() for name, tensor in model.state_dict().items() if ".lora_" in name}
        lora = wide_adapter(lora, handle.method)
        write_result(staging, model=model, lora=lora, tokenizer=tokenizer, prompts=prompts, plan=plan)
    return folder


def _require_same_base(base: Any, handle: AppliedPat) -> None:
    now = frozen_hashes(base)
    for name, sha256 in handle.frozen_sha256.items():
        if now.get(name) != sha256:
            raise ChangedInput(
                f"{handle.checkpoint.source}: {name}",
                expected="the frozen weights of the base",
                found="no such tensor in the model" if name not in now else "other values",
                fix="The export starts from the base's files: train LoRA and the HSMs alone.",
            )
