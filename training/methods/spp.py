"""SPP (arXiv 2405.16057): tune a sparse model and keep its zeros.

A weight W with zeros is frozen, and the model computes with W + c W o (rep(A) o b): A (R, I), each of whose rows serves
O / R rows of W, and b (O, 1), which starts at zero. An entry that is zero stays zero, and the same expression merges
exactly. A plain LoRA update would fill the zeros when it is merged.

The published code needs O to be a multiple of R; here row o of W takes row o R // O of A, whatever O is.

Shape suffixes: I inputs, O outputs, R rows of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from pat_serve.cut.pattern import UNSTRUCTURED, Pattern
from pat_serve.errors import UsageError
from pat_serve.run.plan import BaseReference, PruningPlan
from pat_serve.terminal.progress import track
from pat_serve.training.method_settings import OwnSettings
from pat_serve.training.methods.base import Method
from pat_serve.training.methods.lora import LoraOnly
from pat_serve.training.ranks import snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.training.config import TrainRecipe

# With fewer zeros in all linears together, a model is a dense one.
LEAST_ZEROS = 0.05
# Patterns that are looked for in a base, the strictest first.
_PATTERNS = ("1:4", "2:4", "4:8")


class SppSettings(OwnSettings):
    """The size of the update."""

    rank: int = pydantic.Field(default=16, ge=1, description="Rows of A.")
    scale: float = pydantic.Field(default=2.0, gt=0, description="Factor c of the update.")
    dropout: float = pydantic.Field(default=0.05, ge=0, lt=1, description="Dropout on the inputs of the update.")


class SparseUpdate(nn.Module):
    """The factors of one linear's update.

    Args:
        inputs: I.
        outputs: O.
        settings: of the method.
    """

    def __init__(self, inputs: int, outputs: int, settings: SppSettings) -> None:
        super().__init__()
        rank = min(settings.rank, outputs)
        self.a_RI = nn.Parameter(torch.empty(rank, inputs))
        self.b_O1 = nn.Parameter(torch.zeros(outputs, 1))
        nn.init.kaiming_uniform_(self.a_RI, a=math.sqrt(5))
        self.register_buffer("row_O", torch.arange(outputs) * rank // outputs, persistent=False)
        self.scale, self.dropout = settings.scale, settings.dropout

    def of(self, weight_OI: Tensor) -> Tensor:
        """The update of a weight, in the factors' dtype: zero wherever the weight is."""
        row_O = self.row_O
        assert isinstance(row_O, Tensor)
        return self.scale * (weight_OI.to(self.a_RI.dtype) * self.a_RI[row_O] * self.b_O1)

    def forward(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """The update's part of the linear's output; the update itself is made anew for the backward pass."""
        x = F.dropout(x, self.dropout, self.training)
        output: Tensor = recomputed(self._output, x, weight_OI, use_reentrant=False, preserve_rng_state=False)
        return output

    def _output(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return F.linear(x, self.of(weight_OI).to(x.dtype))


class Spp(Method):
    """Sparse weights, tuned and as sparse afterwards."""

    name: ClassVar[str] = "spp"
    prunes: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    axes: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[type[OwnSettings]] = SppSettings
    # The authors'.
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 4e-3, "weight_decay": 1e-3}
    unused: ClassVar[frozenset[str]] = LoraOnly.unused | {
        "lora_rank", "lora_alpha", "lora_dropout", "lora_head", "lr_scale", "quantize_base", "distillation_weight",
        "train_norms", "train",
    }  # fmt: skip
    why_unused: ClassVar[str] = "tunes the numbers that are there, and nothing else"

    @classmethod
    def check_base(cls, recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
        """Refuse a dense base: there would be no zeros to keep."""
        zeros = numbers = 0
        linears = [
            entry
            for name, entry in checkpoint.tensors.items()
            if checkpoint.family.match(name)[0].lora and len(entry.shape) == 2
        ]
        for entry in track(linears, "count zeros", len(linears)):
            weight_OI = entry.read()
            zeros += int((weight_OI == 0).sum())
            numbers += weight_OI.numel()
        if zeros < LEAST_ZEROS * numbers:
            raise UsageError(
                f"--model {recipe.model}",
                expected=f"a sparse model for --method {cls.name}, with {LEAST_ZEROS:.0%} zeros in its linears or more",
                found=f"{zeros / numbers:.2%} zeros",
                fix="Prune it first: pat-train --method one-shot, then pat-export; or tune it with --method lora.",
            )

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Put an update on every linear of the layers."""
        settings = SppSettings.of(self.recipe)
        self.updates: dict[str, SparseUpdate] = {}
        self.linears: dict[str, nn.Linear] = {}
        for name, spec, _ in self.family.modules(num_layers):
            if not spec.lora:
                continue
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            update = SparseUpdate(linear.in_features, linear.out_features, settings)
            linear.add_module("spp", update)
            linear.register_forward_hook(_add_update)
            self.updates[name], self.linears[name] = update, linear

    def modules(self) -> dict[str, nn.Module]:
        """Every update."""
        return dict(self.updates)

    def merged(self, stored: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every linear's weight with its update in it, float32, by its tensor's name."""
        for name, update in self.updates.items():
            a_RI, b_O1 = snapshot(update.a_RI), snapshot(update.b_O1)
            # The weight comes from the files: in memory it may be rounded to the training's dtype.
            weight_OI = stored(f"{name}.weight").float()
            row_O = torch.arange(len(weight_OI)) * len(a_RI) // len(weight_OI)
            yield f"{name}.weight", weight_OI + update.scale * (weight_OI * a_RI[row_O] * b_O1)

    def plan(self, base: BaseReference) -> PruningPlan:
        """The plan promises that the zeros are still there."""
        sparsity = {}
        for name, linear in self.linears.items():
            weight_OI = snapshot(linear.weight)
            if (weight_OI == 0).double().mean() >= LEAST_ZEROS:
                held = (pattern for pattern in _PATTERNS if Pattern.parse(pattern).held_by(weight_OI))
                sparsity[name] = next(held, UNSTRUCTURED)
        return PruningPlan(method=self.name, base=base, sparsity=sparsity)


def _add_update(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = linear.spp(inputs[0], linear.weight)
    return output + added
