"""Measure a base's residual stream on the run's own data: its energy by channel, and its principal axes.

The measure is taken once, before the first step, and kept in the run's folder: a resumed run and every process of a
distributed one must turn the model by the same matrix, to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pat_serve.cut.rotation import effective_gain, principal_axes
from pat_serve.families.architectures import FINAL_NORM
from pat_serve.families.family import Family
from pat_serve.training.data import PadBatch
from pat_serve.training.model.passes import evaluating, run_decoder, summed_loss
from pat_serve.training.model.tie import axes_beside, column_energies, gain_of_the_turned

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe

CALIBRATION_FILE = "calibration.safetensors"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The measure of a base's residual stream.

    Attributes:
        importance_D: share of the total in each channel (of the rotated stream, if it is rotated), float32.
        rotation_DD: Q, float32; None when the stream stays as it is.
        last_gain_D: the last norm's weight of a turned model whose head stays tied, float32, in the form that the base
            stores; None for any other.
    """

    importance_D: Tensor
    rotation_DD: Tensor | None
    last_gain_D: Tensor | None = None

    def save(self, folder: Path) -> None:
        """Write calibration.safetensors, complete or not at all."""
        tensors = {"importance": self.importance_D}
        if self.rotation_DD is not None:
            tensors["rotation"] = self.rotation_DD
        if self.last_gain_D is not None:
            tensors["last_gain"] = self.last_gain_D
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
        return Calibration(
            importance_D=tensors["importance"],
            rotation_DD=tensors.get("rotation"),
            last_gain_D=tensors.get("last_gain"),
        )


def rows_at_once(recipe: TrainRecipe) -> int:
    """Choose the rows of a batch: the recipe's, or one where the recipe recomputes activations.

    The measure recomputes nothing: one row then keeps as much memory as a whole batch does with recomputation.
    """
    return 1 if recipe.gradient_checkpointing else recipe.batch_size


def calibration_batches(examples: Sequence[dict[str, list[int]]], batch_size: int) -> list[dict[str, Tensor]]:
    """Make padded batches of the first examples."""
    return [PadBatch()(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)]


def calibrate(
    model: Any,
    family: Family,
    num_layers: int,
    batches: Iterable[dict[str, Tensor]],
    *,
    rotate: Literal["none", "energy", "loss"],
    by_gradient: bool = False,
    keeps_tie: bool = False,
) -> Calibration:
    """Measure the stream where the norms read it.

    Args:
        model: the base, as loaded.
        family: its architecture.
        num_layers: of the base.
        batches: input_ids, attention_mask and labels.
        rotate: "energy" finds the stream's principal axes; "loss" those of its energy and of the loss's gradient
            together, each with a trace of one; "none" leaves the channels as they are.
        by_gradient: rank the channels of an unrotated stream as LLM-Pruner does, and not by their energy.
        keeps_tie: the head of a rotated model stays tied, so some channels are left out of the rotation (`tie.py`).
    """
    if rotate == "none":
        if by_gradient:
            importance_D = gradient_importance(model, family, num_layers, batches)
        else:
            importance_D = stream_moments(model, family, num_layers, batches)["energy"].diagonal()
        return Calibration(importance_D=(importance_D / importance_D.sum()).float(), rotation_DD=None)
    moments = stream_moments(model, family, num_layers, batches, with_gradient=rotate == "loss")
    metric_DD = moments["energy"] / moments["energy"].trace()
    if "gradient" in moments:
        metric_DD = metric_DD + moments["gradient"] / moments["gradient"].trace()
    if keeps_tie:
        return _calibrated_tied(model, family, metric_DD, moments["last"])
    rotation_DD, importance_D = principal_axes(metric_DD)
    return Calibration(importance_D=importance_D.float(), rotation_DD=rotation_DD.float().contiguous())


def _calibrated_tied(model: Any, family: Family, metric_DD: Tensor, last_D: Tensor) -> Calibration:
    """Axes of all channels but those that the last norm's gain keeps apart; these always stay."""
    head = model.get_output_embeddings().weight
    gain_D = effective_gain(model.get_submodule(FINAL_NORM).weight.detach().cpu().double(), family)
    alone, tied_gain_D = gain_of_the_turned(gain_D, last_D, column_energies(head))
    rotation_DD, importance_D = axes_beside(metric_DD, alone)
    return Calibration(
        importance_D=importance_D.float(),
        rotation_DD=rotation_DD.float().contiguous(),
        last_gain_D=(tied_gain_D - family.norm_offset).to(head.dtype).float(),
    )


def stream_moments(
    model: Any,
    family: Family,
    num_layers: int,
    batches: Iterable[dict[str, Tensor]],
    *,
    with_gradient: bool = False,
) -> dict[str, Tensor]:
    """Second moments of what the layers see of the stream, over all hidden norms and all real tokens.

    A layer sees x divided by its RMS, times a gain that belongs to its weights; so a token with large activations
    counts no more than any other. The gradient is the loss's with respect to the same normalised x.

    Returns:
        float64 sums over tokens: "energy" of x x^T (D, D), "last" of the last norm's x^2 alone (D,), and, if asked
        for, "gradient" of g g^T (D, D).
    """
    norms = [model.get_submodule(name) for name, spec, _ in family.modules(num_layers) if spec.hidden_norm]
    last = model.get_submodule(FINAL_NORM)
    moments = _Moments()

    def listen(norm: Any, inputs: tuple[Tensor, ...], output_BTD: Any) -> None:
        x_BTD, real_BT = inputs[0], moments.real
        x_ND = x_BTD.detach()[real_BT].float()
        x_ND = x_ND * x_ND.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        moments.add("energy", _second(x_ND))
        if norm is last:
            moments.add("last", x_ND.square().sum(0))
        if with_gradient:
            gain_D = effective_gain(norm.weight.detach(), family).float()
            output_BTD.register_hook(lambda g_BTD: moments.add("gradient", _second(g_BTD[real_BT].float() * gain_D)))

    handles = [norm.register_forward_hook(listen) for norm in norms]
    with evaluating(model, handles), torch.set_grad_enabled(with_gradient):
        for batch in batches:
            moments.real = batch["attention_mask"].to(model.device).bool()
            if with_gradient:
                torch.autograd.backward(summed_loss(model, batch))
            else:
                run_decoder(model, batch)
    return {name: total.cpu() for name, total in moments.sums.items()}


def gradient_importance(model: Any, family: Family, num_layers: int, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """LLM-Pruner's first-order score (arXiv 2305.11627) of each hidden channel: sum of |w * dL/dw| over its weights.

    Summed over every weight that the channel touches, in all layers; float64 (D,). Gradients are used and dropped one
    tensor at a time.
    """
    total_D = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    handles: list[RemovableHandle] = []
    touched: list[Any] = []

    def take(weight: Any, dimension: int) -> None:
        score = (weight.detach() * weight.grad).abs().float()
        others = [d for d in range(score.dim()) if d != dimension]
        total_D.add_((score.sum(others) if others else score).double().cpu())
        weight.grad = None

    with evaluating(model, handles), torch.enable_grad():
        for name, spec, _ in family.modules(num_layers):
            weight: Any = model.get_submodule(name).weight
            # A tied head is the embedding, and its gradient has both parts.
            if spec.hidden_dimension is not None and not any(weight is other for other in touched):
                weight.requires_grad_(True)
                touched.append(weight)
                dimension = spec.hidden_dimension
                handles.append(weight.register_post_accumulate_grad_hook(lambda w, d=dimension: take(w, d)))
        for batch in batches:
            torch.autograd.backward(summed_loss(model, batch))
        for weight in touched:
            weight.requires_grad_(False)
    return total_D


class _Moments:
    """Running sums in float64; the mask of real tokens is set before every batch."""

    real: Tensor

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, product: Tensor) -> None:
        self.sums[name] = product.double() if name not in self.sums else self.sums[name] + product.double()


def _second(x_ND: Tensor) -> Tensor:
    return x_ND.T @ x_ND
