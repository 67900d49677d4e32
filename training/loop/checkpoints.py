"""Checkpoints of a run: step-N is complete or absent, and what was trained is one safetensors file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from pat_serve.errors import Diverged
from pat_serve.files.atomic import rename_durably, retire, sync_tree, write_json
from pat_serve.run.folder import CHECKPOINTS_FOLDER, list_checkpoints
from pat_serve.training.methods import Method
from pat_serve.training.ranks import overwrite, snapshot

TRAINED_FILE = "trained.safetensors"
LOSSES_FILE = "losses.json"


class CheckpointingTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed by mypy
    """A Trainer with checkpoints of its own.

    Transformers' Trainer writes the optimizer, the scheduler, the random state and its own. What is trained goes into
    one safetensors file instead of its pickle and of PEFT's adapter, which does not know the HSMs.

    Args:
        method: its modules are saved with every checkpoint.
        run: the run's folder; checkpoints go to run/checkpoints/step-N.
        keep_checkpoints: how many of them to keep.
        settings: everything else that `Trainer` takes.
    """

    def __init__(self, *, method: Method, run: Path, keep_checkpoints: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.method = method
        self.run = run
        self.checkpoints = run / CHECKPOINTS_FOLDER
        self.keep_checkpoints = keep_checkpoints
        self.last_finite_loss = "none before it"

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters that the run trains, by name, the frozen mask's among them."""
        own = {id(p) for module in self.method.modules().values() for p in module.parameters()}
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.requires_grad or id(parameter) in own:
                yield name, parameter

    def losses_so_far(self) -> dict[str, Any]:
        """The means that are being taken between two lines of metrics.jsonl; all ranks take part."""
        raise NotImplementedError

    def last_checkpoint(self) -> str:
        """Name the last whole checkpoint, as the end of a sentence; empty where there is none."""
        checkpoints = list_checkpoints(self.checkpoints.parent)
        return f"; {checkpoints[-1].name} in its checkpoints folder is the last whole one" if checkpoints else ""

    def _staging(self) -> Path:
        return self.checkpoints / ".partial"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            shutil.rmtree(self._staging(), ignore_errors=True)
        # Other ranks write their random state into the folder: not before it was emptied, nor after it was renamed.
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        losses = self.losses_so_far()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            written, target = self._staging() / f"checkpoint-{step}", self.checkpoints / f"step-{step}"
            write_json(written / LOSSES_FILE, losses)
            sync_tree(written)
            if target.exists():
                shutil.rmtree(retire(target))
            rename_durably(written, target)
            shutil.rmtree(self._staging())
            for old in list_checkpoints(self.checkpoints.parent)[: -self.keep_checkpoints]:
                # Renamed first: a crash half-way through must not leave half a checkpoint under a complete one's name.
                os.replace(old, self._staging())
                shutil.rmtree(self._staging())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; all ranks take part, since each may hold a shard."""
        assert output_dir is not None
        tensors = {name: snapshot(parameter) for name, parameter in self.trained()}
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                # Written, it would take the place of one that a run can go on from.
                raise Diverged(
                    f"{self.run}, step {self.state.global_step}",
                    expected="finite weights in a checkpoint",
                    found=f"NaN or infinity; the last finite loss was {self.last_finite_loss}",
                    fix=f"Train again with a lower --learning-rate{self.last_checkpoint()}.",
                )
            save_file(tensors, Path(output_dir) / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        trained = dict(self.trained())
        assert saved.keys() == trained.keys(), "the checkpoint belongs to another recipe"
        for name, parameter in trained.items():
            overwrite(parameter, saved[name])
