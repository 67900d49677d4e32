"""The settings that are PAT's alone: axes of the stream, mask, gate and operators. The recipe inherits them."""

from __future__ import annotations

from typing import Literal

import pydantic


class PatSettings(pydantic.BaseModel):
    """Each setting is a flag of `pat-train`, a line of a recipe and an entry of `PatConfig` of the same name."""

    mask_learning_rate: float | None = pydantic.Field(default=None, gt=0)
    hio_rank: int | None = pydantic.Field(default=None, ge=0)
    tied_embeddings: Literal["auto", "keep", "untie"] = "auto"
    milestone_share: float = pydantic.Field(default=1 / 3, gt=0, le=1)
    rotate: Literal["auto", "none", "energy", "loss"] = "auto"
    mask_start: Literal["auto", "zero", "energy", "gradient"] = "auto"
    gate: Literal["auto", "anneal", "gradual", "cut"] = "auto"
    # The paper's 1; 0 leaves the identity loss out (docs/study_toys.md).
    identity_weight: float = pydantic.Field(default=1.0, ge=0)

    @pydantic.field_validator("hio_rank", mode="before")
    @classmethod
    def _auto_rank(cls, rank: object) -> object:
        """`auto`, in words or as nothing, is decided when the gate and the width are known."""
        return None if rank == "auto" else rank

    @pydantic.model_validator(mode="after")
    def _axes_and_gate_agree(self) -> PatSettings:
        if self.gate in ("gradual", "cut") and self.mask_start == "zero":
            raise ValueError(f"gate {self.gate} needs mask_start energy or gradient, which says what to cut")
        if self.mask_start == "gradient" and self.rotate in ("energy", "loss"):
            raise ValueError("mask_start gradient ranks the base's own channels: rotate none")
        return self

    def resolved_hio_rank(self, hidden_size: int) -> int:
        """The HIO's rank R, as given or by the rule of thumb (docs/study_toys.md, docs/ablation.md).

        The rank is 0 where channels are cut from the start: LoRA on the same linears does the operator's work. Where
        the mask is trained, it is the paper's share of the width (200 of 4096), in multiples of 8.

        Args:
            hidden_size: D, of the base; the gate must be resolved.
        """
        if self.hio_rank is not None:
            return self.hio_rank
        return 0 if self.gate == "cut" else max(8, hidden_size * 200 // 4096 // 8 * 8)
