"""The Trainer's side of a method: its clock, its own learning rates, and its losses in the forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat_serve.errors import Diverged, RunError, UsageError
from pat_serve.training.api.applied import AppliedPat, applied
from pat_serve.training.groups import rate_factor
from pat_serve.training.methods import Method

KEPT_SAMPLES = 8


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
        handle = applied(kwargs["model"])
        if state.global_step > 0 or args.load_best_model_at_end:
            raise RunError(
                "the Trainer",
                expected="a training from its first step to its last",
                found="a resumption" if state.global_step > 0 else "load_best_model_at_end",
                fix="Leave it out: its checkpoints hold no HSMs. pat-train's do, and resume.",
            )
        least = handle.method.least_steps(handle.recipe)
        if state.max_steps < least:
            raise UsageError(
                "the Trainer",
                expected=f"at least {least} optimizer steps, in which the gate closes ({handle.recipe.gate})",
                found=str(state.max_steps),
                fix="Raise max_steps or num_train_epochs.",
            )
        handle.method.set_total_steps(state.max_steps)
        # The Trainer multiplies its loss by the number of processes where it averages over all their tokens.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        averaged = distributed and args.average_tokens_across_devices
        handle.loss_multiplier = torch.distributed.get_world_size() if averaged else 1
        _give_own_rates(handle.method, kwargs["optimizer"], kwargs["lr_scheduler"])
        _scale_rates(kwargs["model"], handle.recipe.lr_scale, kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the method its step."""
        handle = applied(kwargs["model"])
        handle.method.on_step(state.global_step)
        handle.in_step = handle.first_micro_batch = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A forward pass from here on belongs to no step."""
        applied(kwargs["model"]).in_step = False

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
            logs |= applied(kwargs["model"]).method.metrics()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the gate arrive where the last step has brought it."""
        handle = applied(kwargs["model"])
        handle.method.on_step(state.global_step)
        handle.trained = True


def add_losses(model: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the method's losses join the model's own while it trains, each with its whole weight a step.

    With `num_items_in_batch` the micro-batches' losses are summed, so one of them, the first, carries the method's;
    without it the Trainer averages over the micro-batches, so each of them does.
    """
    handle = applied(model)
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
    terms = [term.to(loss.device) for term in handle.method.losses().values()]
    if terms and (not summed or handle.first_micro_batch):
        regulariser = torch.stack(terms).sum()
        output.loss = loss + (regulariser / handle.loss_multiplier if summed else regulariser)
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


def _give_own_rates(method: Method, optimizer: Any, scheduler: Any) -> None:
    """Move what has a rate of the method's own, as the mask's logits, into parameter groups with that constant rate."""
    for module, rate in method.learning_rates().items():
        for own in method.modules()[module].parameters():
            if not own.requires_grad:
                continue
            multiplying = _multiplying(scheduler)
            group = next(group for group in optimizer.param_groups if any(entry is own for entry in group["params"]))
            group["params"] = [entry for entry in group["params"] if entry is not own]
            settings = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(settings | {"params": [own], "lr": rate, "initial_lr": rate})
            multiplying.base_lrs.append(rate)
            multiplying.lr_lambdas.append(lambda _step: 1.0)


def _scale_rates(model: Any, scales: Mapping[str, float], optimizer: Any, scheduler: Any) -> None:
    """Move what has another rate than the Trainer's into groups of its own, under the Trainer's schedule."""
    if not scales:
        return
    scheduler = _multiplying(scheduler)
    method = applied(model).method
    own = {id(p) for module in method.learning_rates() for p in method.modules()[module].parameters()}
    factors = {
        id(parameter): rate_factor(name, scales)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    }
    for index, group in enumerate(list(optimizer.param_groups)):
        moved: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            moved.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        group["params"] = moved.pop(1.0, [])
        settings = {name: value for name, value in group.items() if name != "params"}
        for factor, parameters in moved.items():
            rates = {name: settings[name] * factor for name in ("lr", "initial_lr")}
            optimizer.add_param_group(settings | rates | {"params": parameters})
            scheduler.base_lrs.append(rates["initial_lr"])
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[index])


def _multiplying(scheduler: Any) -> LambdaLR:
    """The scheduler itself, out of accelerate's wrapper.

    Raises:
        UsageError: of a kind that takes no further parameter group.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        raise UsageError(
            "lr_scheduler_type",
            expected="one that multiplies the rate (linear, cosine, constant, ...)",
            found=type(scheduler).__name__,
            fix="Choose another: the mask has a learning rate of its own, and so has every group of lr_scale.",
        )
    return scheduler
