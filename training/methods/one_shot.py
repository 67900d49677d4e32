"""One-shot pruning: zeros in the decoder's linears, made up for by least squares and not by training.

MRP (arXiv 2410.15567) with its forerunners SparseGPT, Wanda and magnitude pruning, AlphaPruning's allocation and
DSnoT's refinement. `training/sparse/` does it layer by layer. The model keeps every size, and vLLM computes with
a zero as with any other number: the model becomes a subject of study, or a start for `spp`, and no faster one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic
from torch import nn

from pat_serve.cut.pattern import LARGEST_SPARSITY, UNSTRUCTURED, Pattern
from pat_serve.errors import UsageError
from pat_serve.training.method_settings import OwnSettings
from pat_serve.training.methods.base import Method
from pat_serve.training.methods.lora import LoraOnly
from pat_serve.training.sparse.one_linear import Compensation, Zeroing
from pat_serve.training.sparse.removal import DAMPING

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.training.config import TrainRecipe

# By mask: AlphaPruning's spread for SparseGPT, Wanda and magnitudes at 70 %.
_SPREADS = {"S": 0.2, "M": 0.2, "wanda": 0.3, "magnitude": 0.5}


class OneShotSettings(OwnSettings):
    """Settings of one-shot pruning: the entries to remove, and what makes up for them."""

    sparsity: float | None = pydantic.Field(
        default=None,
        gt=0,
        lt=LARGEST_SPARSITY,
        description="Share of zeros in the decoder's linears, in (0, 0.95). [default: 0.5, or the pattern's]",
    )
    pattern: str = pydantic.Field(
        default=UNSTRUCTURED,
        description="Where zeros may stand: unstructured, or N:M (2:4): N stay of every M in a row.",
    )
    mask: Literal["magnitude", "wanda", "S", "M"] | None = pydantic.Field(
        default=None,
        description="What goes: by magnitude, by Wanda's score, entries that cost least one by one (S), or the set of "
        "a group that costs least together (M; N:M alone). [default: M with N:M, else S]",
    )
    compensation: Literal["none", "S", "M"] = pydantic.Field(
        default="M",
        description="What makes up for it: nothing, column after column (S), or a block's entries together (M).",
    )
    allocation: Literal["uniform", "alpha"] = pydantic.Field(
        default="uniform",
        description="Zeros by layer: the same share, or fewer where spectra are heavy-tailed (AlphaPruning).",
    )
    spread: float | None = pydantic.Field(
        default=None,
        gt=0,
        lt=1,
        description="Of --allocation alpha: shares from 1 - spread to 1 + spread times the sparsity, before they are "
        "scaled. [default: 0.2; 0.3 with --mask wanda, 0.5 with magnitude]",
    )
    refine: Literal["dsnot"] | None = pydantic.Field(
        default=None, description="Swap entries of the mask so that mean outputs change less (DSnoT)."
    )
    damping: float = pydantic.Field(
        default=DAMPING,
        gt=0,
        le=1,
        description="Share of its mean diagonal that is added to the inputs' second moment.",
    )

    @pydantic.field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        Pattern.parse(pattern)
        return pattern

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> OneShotSettings:
        given = Pattern.parse(self.pattern)
        if given.sparsity is not None and self.sparsity not in (None, given.sparsity):
            raise ValueError(f"no sparsity beside pattern {self.pattern}, whose share of zeros is {given.sparsity:g}")
        if given.sparsity is not None and self.allocation == "alpha":
            raise ValueError(f"allocation uniform: pattern {self.pattern} gives every layer the same share of zeros")
        if self.mask == "M" and not given.group:
            raise ValueError("mask S: mask M tries all sets of a group, and an unstructured pattern has no groups")
        if self.spread is not None and self.allocation != "alpha":
            raise ValueError("no spread without allocation alpha")
        return self

    @property
    def share(self) -> float:
        """Share of zeros in all linears together."""
        return Pattern.parse(self.pattern).sparsity or self.sparsity or 0.5

    @property
    def resolved_spread(self) -> float:
        """AlphaPruning's eps."""
        return self.spread if self.spread is not None else _SPREADS[self.zeroing(self.share).mask]

    def zeroing(self, sparsity: float) -> Zeroing:
        """How a linear's zeros are made, of a layer with this share of them."""
        pattern = Pattern.parse(self.pattern)
        compensation: Compensation = self.compensation
        return Zeroing(
            pattern=pattern,
            sparsity=sparsity,
            mask=self.mask or ("M" if pattern.group else "S"),
            compensation=compensation,
            dsnot=self.refine == "dsnot",
            damping=self.damping,
        )


class OneShot(Method):
    """Zeros without any training."""

    name: ClassVar[str] = "one-shot"
    prunes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    axes: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[type[OwnSettings]] = OneShotSettings
    unused: ClassVar[frozenset[str]] = (LoraOnly.unused - {"calibration_rows"}) | {
        "streaming", "packing", "eval_data", "eval_split", "eval_share", "eval_steps", "max_steps", "epochs",
        "gradient_accumulation_steps", "learning_rate", "lr_scale", "lr_scheduler", "warmup_steps", "weight_decay",
        "max_grad_norm", "gradient_checkpointing", "quantize_base", "lora_rank", "lora_alpha", "lora_dropout",
        "lora_head", "distillation_weight", "train_norms", "train", "report_to", "logging_steps", "save_steps",
        "keep_checkpoints",
    }  # fmt: skip
    why_unused: ClassVar[str] = "trains nothing"

    @classmethod
    def wants_batches(cls, recipe: TrainRecipe) -> bool:
        """Always: the layers are pruned on what passes through them."""
        return True

    @classmethod
    def check_base(cls, recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
        """Check that the pattern's groups divide the inputs of every linear."""
        pattern = OneShotSettings.of(recipe).pattern
        group = Pattern.parse(pattern).group
        for name, entry in checkpoint.tensors.items():
            spec, layer, kind = checkpoint.family.match(name)
            if group and spec.lora and kind == "weight" and entry.shape[1] % group:
                raise UsageError(
                    "--pattern",
                    expected=f"N:M with an M that divides the {entry.shape[1]} inputs of {spec.module.format(i=layer)}",
                    found=pattern,
                    fix="Choose another M, or --pattern unstructured.",
                )

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Leave the model as it is."""

    def modules(self) -> dict[str, nn.Module]:
        """No modules."""
        return {}
