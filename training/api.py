"""PAT as published in a notebook: any model of a known family, any stock Trainer, and a run/ that pat-export takes.

    model = AutoModelForCausalLM.from_pretrained(base)
    model = apply_pat(model, PatConfig(ratio=0.25))
    Trainer(model, args, train_dataset=..., callbacks=[PatCallback()]).train()
    save_run(model, "run")

The method's losses reach the Trainer's through a forward hook on the PEFT model, so no Trainer has to be subclassed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat_serve.atomic import check_vacant, new_folder
from pat_serve.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import Diverged, RunError, UnfinishedRun, UsageError
from pat_serve.training.base_weights import require_same_weights
from pat_serve.training.config import PAPER, TrainRecipe
from pat_serve.training.data import load_tokenizer
from pat_serve.training.insert import adapt
from pat_serve.training.methods.pat import Pat
from pat_serve.training.result import write_result
from pat_serve.training.schedule import LEAST_STEPS
from pat_serve.training.width import target_width

KEPT_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class PatConfig:
    """What `apply_pat` adds to a model; fields and defaults are those of `pat-train --recipe paper`.

    Attributes:
        ratio: share of the hidden channels to cut, in (0, 0.6]; 0.25 when neither this nor hidden_size is given.
        hidden_size: width to end with, instead of a ratio.
        lora_rank: of the adapter.
        lora_alpha: of the adapter.
        lora_dropout: of the adapter.
        hio_rank: of the hybrid operators; in proportion to the paper's 200 of 4096 by default.
        milestone_share: share of the run after which the gate would be hard.
        mask_learning_rate: 0.5 / milestone by default.
        base: where the model's files are, if not where `from_pretrained` found them.
        revision: of the base on the hub; the loaded one's by default.
    """

    ratio: float | None = None
    hidden_size: int | None = None
    lora_rank: int = 20
    lora_alpha: float = 4.0
    lora_dropout: float = 0.05
    hio_rank: int | None = None
    milestone_share: float = 1 / 3
    mask_learning_rate: float | None = None
    base: str | None = None
    revision: str | None = None


@dataclass(kw_only=True)
class AppliedPat:
    """The handle `model.pat`: the method, what it was applied to, and where the Trainer is."""

    method: Pat
    recipe: TrainRecipe
    checkpoint: Checkpoint
    samples: list[list[int]] = field(default_factory=list)
    in_step: bool = False
    # The next micro-batch is the first of its optimizer step.
    first_micro_batch: bool = True
    loss_multiplier: int = 1


def apply_pat(model: Any, config: PatConfig | None = None) -> Any:
    """Add LoRA and the HSMs to a loaded model; the base is frozen.

    Args:
        model: from `AutoModelForCausalLM.from_pretrained`; its files must still be there, the export starts from them.
        config: the settings.

    Returns:
        the PEFT model, with an `AppliedPat` as its attribute `pat`.

    Raises:
        PatServeError: the model's files are not found, are of no known family or hold other weights, or the width is
            illegal.
    """
    settings = asdict(config or PatConfig())
    source = settings.pop("base") or str(model.config._name_or_path)
    settings["revision"] = settings["revision"] or getattr(model.config, "_commit_hash", None)
    source = str(Path(source).resolve()) if Path(source).is_dir() else source
    recipe = TrainRecipe.build({**PAPER, "model": source, "data": "passed to a Trainer", **settings}, "PatConfig")
    checkpoint = open_checkpoint(source, recipe.revision)
    require_same_weights(model, checkpoint)
    width = target_width(recipe, checkpoint)
    # The schedule is stretched once the Trainer knows its steps.
    adapted: Any
    adapted, method = adapt(model, checkpoint.family, recipe, width, LEAST_STEPS)
    assert isinstance(method, Pat)
    for module in method.modules().values():
        module.to(next(model.parameters()).device)
    handle = AppliedPat(method=method, recipe=recipe, checkpoint=checkpoint)
    adapted.pat = handle
    adapted.register_forward_hook(_add_losses, with_kwargs=True)
    return adapted


class PatCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Moves the gate along its schedule, gives the mask its own learning rate, and logs the gate's figures.

    Resuming from a checkpoint is left to `pat-train`: the Trainer's own checkpoints hold no HSMs.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stretch the schedule over the Trainer's steps.

        Raises:
            RunError: the Trainer resumes, or would put back a checkpoint at the end.
            UsageError: too few steps, or a scheduler that takes no second learning rate.
        """
        handle = _handle(kwargs["model"])
        if state.global_step > 0 or args.load_best_model_at_end:
            raise RunError(
                "the Trainer",
                expected="a training from its first step to its last",
                found="a resumption" if state.global_step > 0 else "load_best_model_at_end",
                fix="Leave it out: its checkpoints hold no HSMs. pat-train's do, and resume.",
            )
        if state.max_steps < LEAST_STEPS:
            raise UsageError(
                "max_steps",
                expected=f"at least {LEAST_STEPS} optimizer steps, for the gate's schedule",
                found=str(state.max_steps),
                fix="Train longer, or use smaller batches.",
            )
        handle.method.set_total_steps(state.max_steps)
        # The Trainer multiplies its loss by the number of processes where it averages over all their tokens.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        averaged = distributed and args.average_tokens_across_devices
        handle.loss_multiplier = torch.distributed.get_world_size() if averaged else 1
        _give_mask_its_rate(handle.method, kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the method its step."""
        handle = _handle(kwargs["model"])
        handle.method.on_step(state.global_step)
        handle.in_step = handle.first_micro_batch = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A forward pass from here on belongs to no step."""
        _handle(kwargs["model"]).in_step = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the gate's figures for the callbacks that come after this one."""
        if logs and "loss" in logs:
            logs |= _handle(kwargs["model"]).method.metrics()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the gate arrive where the last step has brought it."""
        _handle(kwargs["model"]).method.on_step(state.global_step)


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
        UnfinishedRun: the training ended before the mask was frozen.
        ChangedInput: the base's weights are not those of its files any more.
        Diverged: a trained weight is not finite.
        OutputExists: the folder is there.
    """
    handle, folder = _handle(model), Path(folder)
    if not handle.method.mask.frozen:
        raise UnfinishedRun(
            "the model",
            expected=f"a training beyond the mask's freeze at step {handle.method.mask.schedule.freeze_step}",
            found=f"one of {handle.method.step} steps",
            fix="Train to the end, with PatCallback among the Trainer's callbacks.",
        )
    prompts = prompts or handle.samples
    if not prompts:
        raise UsageError("prompts", expected="token ids for the parity check", found="none", fix="Pass some.")
    base = model.get_base_model()
    require_same_weights(base, handle.checkpoint)
    check_vacant(folder, force=force, inputs=[handle.checkpoint.folder])
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(handle.checkpoint.folder)
    with new_folder(folder) as staging:
        handle.recipe.model_copy(update={"max_steps": handle.method.total_steps}).save(staging)
        plan = handle.method.plan(handle.checkpoint.reference())
        lora = {name: tensor.cpu() for name, tensor in model.state_dict().items() if ".lora_" in name}
        write_result(staging, model=model, lora=lora, tokenizer=tokenizer, prompts=prompts, plan=plan)
    return folder


def _add_losses(model: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the method's losses join the model's own while it trains, each with its whole weight a step.

    With `num_items_in_batch` the micro-batches' losses are summed, so one of them, the first, carries the method's;
    without it the Trainer averages over the micro-batches, so each of them does.
    """
    handle = _handle(model)
    if not model.training or not torch.is_grad_enabled():
        return output
    loss: Tensor | None = output.loss
    if loss is None:
        if handle.in_step:
            raise UsageError(
                "the Trainer",
                expected="a loss that the model computes from labels",
                found="one of its own (label smoothing, compute_loss_func)",
                fix="Leave it out: the method's losses are added to the model's.",
            )
        return output
    if not math.isfinite(float(loss.detach())):
        raise Diverged(
            f"step {handle.method.step + 1}",
            expected="a finite loss",
            found=str(float(loss.detach())),
            fix="Train again with a lower learning rate.",
        )
    _keep_samples(handle, inputs)
    summed = inputs.get("num_items_in_batch") is not None
    if not summed or handle.first_micro_batch:
        terms = torch.stack([term.to(loss.device) for term in handle.method.losses().values()]).sum()
        output.loss = loss + (terms / handle.loss_multiplier if summed else terms)
    handle.first_micro_batch = False
    return output


def _keep_samples(handle: AppliedPat, inputs: dict[str, Any]) -> None:
    """A few training rows, without their padding, for the export's parity check."""
    input_ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or len(handle.samples) >= KEPT_SAMPLES:
        return
    for row, token_ids in enumerate(input_ids):
        kept = token_ids if mask is None or mask.dim() != 2 else token_ids[mask[row].bool()]
        if len(handle.samples) < KEPT_SAMPLES:
            handle.samples.append(kept.tolist())


def _give_mask_its_rate(method: Pat, optimizer: Any, scheduler: Any) -> None:
    """Move the mask's logits into a parameter group of their own, with a constant rate."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # out of accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        raise UsageError(
            "lr_scheduler_type",
            expected="one that multiplies the rate (linear, cosine, constant, ...)",
            found=type(scheduler).__name__,
            fix="Choose another: the mask has a learning rate of its own.",
        )
    (logits,) = method.mask.parameters()
    (rate,) = method.learning_rates().values()
    group = next(group for group in optimizer.param_groups if any(entry is logits for entry in group["params"]))
    group["params"] = [entry for entry in group["params"] if entry is not logits]
    own = {name: value for name, value in group.items() if name != "params"}
    optimizer.add_param_group(own | {"params": [logits], "lr": rate, "initial_lr": rate})
    scheduler.base_lrs.append(rate)
    scheduler.lr_lambdas.append(lambda _step: 1.0)


def _handle(model: Any) -> AppliedPat:
    handle = getattr(model, "pat", None)
    if not isinstance(handle, AppliedPat):
        raise UsageError("the model", expected="one from apply_pat", found=type(model).__name__, fix="Call apply_pat.")
    return handle
