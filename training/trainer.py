"""The training loop: transformers' Trainer with the method's losses, learning rates and complete checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from pat_serve.errors import Diverged
from pat_serve.run_folder import CHECKPOINTS_FOLDER, list_checkpoints
from pat_serve.training.callbacks import StepTimer
from pat_serve.training.evaluation import response_nll, response_perplexity
from pat_serve.training.methods import Method

TRAINED_FILE = "trained.safetensors"


class PruningTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by mypy
    """A Trainer that knows a pruning method.

    Args:
        method: adds losses and parameters; its modules are saved with every checkpoint.
        run: the run's folder; checkpoints go to run/checkpoints/step-N, complete or absent.
        keep_checkpoints: how many of them to keep.
        settings: everything else that `Trainer` takes.
    """

    def __init__(self, *, method: Method, run: Path, keep_checkpoints: int, **settings: Any) -> None:
        if settings.get("eval_dataset") is not None:
            settings |= {
                "compute_metrics": response_perplexity,
                "preprocess_logits_for_metrics": response_nll,
            }
        super().__init__(**settings)
        self.method = method
        self.run = run
        self.checkpoints = run / CHECKPOINTS_FOLDER
        self.keep_checkpoints = keep_checkpoints
        self.optimizer: torch.optim.Optimizer | None
        self._sums: dict[str, float] = {}
        self._micro_batches = 0
        self._tokens = 0
        self._last_finite = "none before it"
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
        cross_entropy, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        loss = cross_entropy
        if model.training:
            micro_batches = self.current_gradient_accumulation_steps
            # transformers gives a sum over all micro-batches' tokens where the model takes the count; a regulariser,
            # which is the same in each of them, then has to be shared out. Otherwise the Trainer divides the whole.
            summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            self._record("cross_entropy", cross_entropy, micro_batches if summed else 1)
            for name, term in self.method.losses().items():
                self._record(name, term, 1)
                loss = loss + (term / micro_batches if summed else term).to(loss.device)
            self._micro_batches += 1
            # A packed row's padding counts as tokens: little, and no mask tells it.
            self._tokens += int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss term's mean since the last line, and the method's figures."""
        if self._micro_batches and "eval_loss" not in logs:
            logs |= {name: total / self._micro_batches for name, total in self._sums.items()}
            logs |= self.method.metrics()
            seconds = self._timer.take_s()
            if seconds > 0:
                # Of all processes, which see the same number each.
                logs["tokens_per_second"] = self._tokens * self.args.world_size / seconds
            self._sums, self._micro_batches, self._tokens = {}, 0, 0
        super().log(logs, start_time)

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
            groups: dict[float, list[nn.Parameter]] = {}
            for parameter in (model or self.model).parameters():
                if parameter.requires_grad:
                    groups.setdefault(own.get(id(parameter), self.args.learning_rate), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            settings["weight_decay"] = self.args.weight_decay
            self.optimizer = optimizer_class(
                [{"params": group, "lr": rate} for rate, group in groups.items()], **settings
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The recipe's schedule; a rate of the method's own stays constant.

        The mask moves in the first quarter of a run alone, which a warm-up of a tenth would halve; of the paper's run
        the warm-up is a third of a per cent.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            for index, group in enumerate(scheduler.optimizer.param_groups):
                if group["initial_lr"] != self.args.learning_rate:
                    scheduler.lr_lambdas[index] = _constant
                    group["lr"] = group["initial_lr"]
        return scheduler

    def _record(self, name: str, value: Tensor, factor: float) -> None:
        number = float(value.detach()) * factor
        if not math.isfinite(number):
            raise Diverged(
                f"{self.run}, step {self.state.global_step + 1}",
                expected="a finite loss",
                found=f"{name} {number}; the last finite loss was {self._last_finite}",
                fix="Train again with a lower --learning-rate; the last checkpoint is in its checkpoints folder.",
            )
        if name == "cross_entropy":
            self._last_finite = f"{number:.4g} in step {self.state.global_step + 1}"
        self._sums[name] = self._sums.get(name, 0.0) + number

    # Checkpoints. The Trainer writes the optimizer, the scheduler, the random state and its own; what is trained goes
    # into one safetensors file instead of its pickle and PEFT's adapter (which does not know the HSMs).

    def _staging(self) -> Path:
        return self.checkpoints / ".partial"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            shutil.rmtree(self._staging(), ignore_errors=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            target = self.checkpoints / f"step-{step}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self._staging() / f"checkpoint-{step}", target)
            shutil.rmtree(self._staging())
            for old in list_checkpoints(self.checkpoints.parent)[: -self.keep_checkpoints]:
                # Renamed first: a crash half-way through must not leave half a checkpoint under a complete one's name.
                os.replace(old, self._staging())
                shutil.rmtree(self._staging())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._trained()}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                # Written, it would take the place of one that a run can go on from.
                raise Diverged(
                    f"{self.run}, step {self.state.global_step}",
                    expected="finite weights in a checkpoint",
                    found=f"NaN or infinity; the last finite loss was {self._last_finite}",
                    fix="Train again with a lower --learning-rate; the checkpoints before it are kept.",
                )
            save_file(tensors, Path(output_dir) / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        trained = dict(self._trained())
        assert saved.keys() == trained.keys(), "the checkpoint belongs to another recipe"
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters that the run trains, the frozen mask's among them."""
        own = {id(p) for module in self.method.modules().values() for p in module.parameters()}
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad or id(parameter) in own:
                yield name, parameter


def _constant(_step: int) -> float:
    return 1.0
