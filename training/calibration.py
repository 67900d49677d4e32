"""What a base's residual stream looks like on the run's own data: its energy by channel, and its principal axes.

Measured once, before the first step, and kept in the run's folder: a resumed run and every process of a distributed one
must turn the model by the same matrix, to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pat_serve.architectures import Family
from pat_serve.rotation import principal_axes

CALIBRATION_FILE = "calibration.safetensors"
# Rows of the training data; the covariance of 4,096 channels wants a few times as many tokens.
CALIBRATION_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured.

    Attributes:
        energy_D: share of the stream's energy in each channel (of the rotated stream, if it is rotated), float32.
        rotation_DD: Q, float32; None when the stream stays as it is.
    """

    energy_D: Tensor
    rotation_DD: Tensor | None

    def save(self, folder: Path) -> None:
        """Write calibration.safetensors, complete or not at all."""
        tensors = {"energy": self.energy_D}
        if self.rotation_DD is not None:
            tensors["rotation"] = self.rotation_DD
        temporary = folder / f".{CALIBRATION_FILE}.partial"
        save_file(tensors, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / CALIBRATION_FILE)

    @staticmethod
    def load(folder: Path) -> Calibration | None:
        """The run's calibration, if it has been measured."""
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        tensors = load_file(path)
        return Calibration(energy_D=tensors["energy"], rotation_DD=tensors.get("rotation"))


def calibrate(
    model: nn.Module, family: Family, num_layers: int, batches: Iterable[dict[str, Tensor]], *, rotate: bool
) -> Calibration:
    """Measure the stream where the norms read it.

    Args:
        model: the base, as loaded.
        family: its architecture.
        num_layers: of the base.
        batches: input_ids and attention_mask.
        rotate: find the principal axes; otherwise the channels stay as they are.
    """
    covariance_DD = stream_covariance(model, family, num_layers, batches)
    if not rotate:
        energy_D = covariance_DD.diagonal()
        return Calibration(energy_D=(energy_D / energy_D.sum()).float(), rotation_DD=None)
    rotation_DD, energy_D = principal_axes(covariance_DD)
    return Calibration(energy_D=energy_D.float(), rotation_DD=rotation_DD.float().contiguous())


@torch.no_grad()
def stream_covariance(
    model: nn.Module, family: Family, num_layers: int, batches: Iterable[dict[str, Tensor]]
) -> Tensor:
    """Sum of x x^T over the inputs of all hidden norms and all real tokens, each x divided by its RMS: float64 (D, D).

    Divided by its RMS, because that is all that a layer sees of a token: one with large activations counts no more.
    """
    norms = [model.get_submodule(name) for name, spec, _ in family.modules(num_layers) if spec.hidden_norm]
    device = next(model.parameters()).device
    total: Tensor | None = None
    real: Tensor

    def add(x_BTD: Tensor) -> None:
        nonlocal total
        x_ND = x_BTD[real].float()
        x_ND = x_ND * x_ND.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        product_DD = (x_ND.T @ x_ND).double()
        total = product_DD if total is None else total + product_DD

    with _evaluating(model), _listening(norms, add):
        for batch in batches:
            real = batch["attention_mask"].to(device).bool()
            model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    assert total is not None
    return total.cpu()


@contextmanager
def _listening(modules: list[nn.Module], listener: Any) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(lambda _module, inputs: listener(inputs[0])) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
