"""The training loop: transformers' Trainer with the method's losses, learning rates and complete checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pat_serve.errors import Diverged
from pat_serve.training.groups import OWN_RATE, parameter_groups
from pat_serve.training.loop.callbacks import StepTimer
from pat_serve.training.loop.checkpoints import LOSSES_FILE, CheckpointingTrainer
from pat_serve.training.loop.distillation import Distilled, distilled
from pat_serve.training.loop.evaluation import response_nll, response_perplexity
from pat_serve.training.methods import Method


class PruningTrainer(CheckpointingTrainer):
    """A Trainer that knows a pruning method.

    Args:
        method: adds losses and parameters; its modules are saved with every checkpoint.
        teacher: the dense base of a distillation; None where the model contains it, or nothing is distilled.
        run: the run's folder; checkpoints go to run/checkpoints/step-N, complete or absent.
        keep_checkpoints: how many of them to keep.
        settings: everything else that `Trainer` takes.
    """

    def __init__(
        self, *, method: Method, run: Path, keep_checkpoints: int, teacher: nn.Module | None = None, **settings: Any
    ) -> None:
        if settings.get("eval_dataset") is not None:
            settings |= {
                "compute_metrics": response_perplexity,
                "preprocess_logits_for_metrics": response_nll,
            }
        super().__init__(method=method, run=run, keep_checkpoints=keep_checkpoints, **settings)
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.optimizer: torch.optim.Optimizer | None
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._tokens: Tensor | int = 0
        # Sum of the cross-entropy and number of micro-batches at the last step that was seen to be finite.
        self._seen = (0.0, 0)
        self._timer = StepTimer()
        self.add_callback(self._timer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy, plus the method's losses while training (never in evaluation).

        Raises:
            Diverged: a term of the training loss is not finite.
        """
        if not model.training and self.compute_metrics is not None:
            # `response_nll` reads the logits, and `evaluation_loop` puts its mean in the place of this loss.
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            nothing = outputs.logits.new_zeros(())
            return (nothing, outputs) if return_outputs else nothing
        weight = self.method.recipe.distillation_weight if model.training else 0.0
        # Where the model takes the count of tokens, a loss is this micro-batch's share of the mean over all
        # micro-batches and ranks. Otherwise it is the micro-batch's own mean, which transformers divides afterwards.
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if weight:
            losses, outputs = self._distil(model, inputs, weight, num_items_in_batch if summed else None)
            loss, cross_entropy = losses.loss, losses.cross_entropy
        else:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            losses, cross_entropy = None, loss
        if model.training:
            micro_batches = self.current_gradient_accumulation_steps
            self._record("cross_entropy", cross_entropy, micro_batches if summed else 1)
            if losses is not None:
                self._record("distillation", losses.kl, micro_batches if summed else 1)
            if self.accelerator.sync_gradients:
                # The regularisers depend on parameters alone, which are the same in all micro-batches of a step and on
                # all ranks: once a step, in full, is the same as a share in each. Ranks average, so no factor for them.
                for name, term in self.method.losses().items():
                    self._record(name, term, micro_batches)
                    loss = loss + (term if summed else term * micro_batches).to(loss.device)
            self._micro_batches += 1
            # A packed row's padding counts as tokens: little, and no mask tells it.
            self._tokens = self._tokens + inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
            if self.accelerator.sync_gradients:
                self._require_finite()
        return (loss, outputs) if return_outputs else loss

    def _distil(
        self, model: nn.Module, inputs: dict[str, Any], weight: float, num_tokens: Tensor | int | None
    ) -> tuple[Distilled, Any]:
        """The losses against the dense base: the teacher, or the same model with adapter and method switched off."""
        seen = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            if self.teacher is not None:
                teacher_BTV = self.teacher(**seen).logits
            else:
                base = self.accelerator.unwrap_model(model)
                with base.disable_adapter(), self.method.disabled():
                    teacher_BTV = model(**seen).logits
        outputs = model(**seen)
        losses = distilled(outputs.logits, teacher_BTV, inputs["labels"], weight, num_tokens)
        if num_tokens is not None:
            # The mean is over all ranks' tokens, and ranks average their gradients, as with transformers' own loss.
            ranks = self.accelerator.num_processes
            losses = Distilled(
                loss=losses.loss * ranks, cross_entropy=losses.cross_entropy * ranks, kl=losses.kl * ranks
            )
        return losses, outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss term's mean since the last line, over all ranks, and the method's figures."""
        if self._micro_batches and "eval_loss" not in logs:
            logs |= {name: mean / self._micro_batches for name, mean in self._mean_sums().items()}
            logs |= self.method.metrics()
            seconds = self._timer.take_s()
            if seconds > 0:
                # The rate is that of all processes, and each sees as many tokens.
                logs["tokens_per_second"] = int(self._tokens) * self.args.world_size / seconds
            self._sums, self._micro_batches, self._tokens, self._seen = {}, 0, 0, (0.0, 0)
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss
        super().log(logs, start_time)

    @property
    def mean_loss(self) -> float:
        """The mean of the loss over all steps, those before a resume too (transformers' own forgets them)."""
        steps: int = self.state.global_step
        return float(self._total_loss_scalar) / max(1, steps)

    def _run_epoch(self, **settings: Any) -> None:
        # transformers starts the epoch that a checkpoint lies in, and notices the end only after one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**settings)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with `eval_loss` weighted by tokens: its own is a mean of the batches' means."""
        output = super().evaluation_loop(*args, **kwargs)
        if "eval_nll" in output.metrics:
            output.metrics["eval_loss"] = output.metrics.pop("eval_nll")
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each learning rate."""
        if self.optimizer is None:
            rates = self.method.learning_rates()
            own = {
                id(parameter): rates[name]
                for name, module in self.method.modules().items()
                if name in rates
                for parameter in module.parameters()
            }
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            settings["weight_decay"] = self.args.weight_decay
            groups = parameter_groups(
                (model or self.model).named_parameters(),
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                scales=self.method.recipe.lr_scale,
                own=own,
            )
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The recipe's schedule; a rate of the method's own stays constant.

        The mask moves in the first quarter of a run alone, which a warm-up of a tenth would halve; of the paper's run
        the warm-up is a third of a per cent.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            for index, group in enumerate(scheduler.optimizer.param_groups):
                if group.get(OWN_RATE):
                    scheduler.lr_lambdas[index] = _constant
                    group["lr"] = group["initial_lr"]
        return scheduler

    def _record(self, name: str, value: Tensor, factor: float) -> None:
        # Kept on the device: reading a number there makes the host wait for it.
        value = value.detach().double() * factor
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _require_finite(self) -> None:
        """Check the losses so far, once an optimizer step: a sum that has met a NaN stays one.

        Raises:
            Diverged: naming the step and what is not finite.
        """
        totals = torch.stack(list(self._sums.values())).tolist()
        step = self.state.global_step + 1
        for name, total in zip(self._sums, totals, strict=True):
            if not math.isfinite(total):
                raise Diverged(
                    f"{self.run}, step {step}",
                    expected="a finite loss",
                    found=f"{name} {total}; the last finite loss was {self.last_finite_loss}",
                    fix=f"Train again with a lower --learning-rate{self.last_checkpoint()}.",
                )
            if name == "cross_entropy":
                before, batches = self._seen
                self.last_finite_loss = f"{(total - before) / (self._micro_batches - batches):.4g} in step {step}"
                self._seen = (total, self._micro_batches)

    def losses_so_far(self) -> dict[str, Any]:
        """Losses of all ranks, which restore the same: rank 0 writes the file, but has a share of the micro-batches."""
        return {
            "since_last_line": float(self.accelerator.reduce(self._tr_loss.clone(), reduction="mean")),
            "before_last_line": float(self._total_loss_scalar),
            "last_line_step": self._globalstep_last_logged,
            "micro_batches": self._micro_batches,
            "sums": self._mean_sums(),
        }

    def _mean_sums(self) -> dict[str, float]:
        """Each term's sum since the last line, as a mean over ranks; empty right after a line."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).to(self.args.device)
        means = self.accelerator.reduce(sums, reduction="mean")
        return dict(zip(self._sums, means.tolist(), strict=True))

    def restore_losses(self, checkpoint: Path) -> None:
        """Go on with the means where the checkpoint left them; after the Trainer has reset its own."""
        saved = json.loads((checkpoint / LOSSES_FILE).read_text(encoding="utf-8"))
        self._tr_loss.fill_(saved["since_last_line"])
        self._total_loss_scalar = saved["before_last_line"]
        self._globalstep_last_logged = saved["last_line_step"]
        self._micro_batches = saved["micro_batches"]
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.args.device)
            for name, value in saved["sums"].items()
        }
        self._seen = (saved["sums"].get("cross_entropy", 0.0), self._micro_batches)


def _constant(_step: int) -> float:
    return 1.0
