"""The settings that are ATP's alone."""

from __future__ import annotations

import pydantic

from pat_serve.training.method_settings import OwnSettings


class AtpSettings(OwnSettings):
    """Each field is a flag of `pat-train --method atp`."""

    # The authors' 4 of 10 epochs.
    control_share: float = pydantic.Field(
        default=0.4, gt=0, lt=1, description="Share of the steps in which the generator decides anew."
    )
    generator_learning_rate: float | None = pydantic.Field(
        default=None,
        gt=0,
        description="Learning rate of the decision generator; no scheduler changes it. [default: the authors' 1e-3, or "
        "in fewer than 157 deciding steps what turns an index within a quarter of them]",
    )
    lasso_weight: float = pydantic.Field(
        default=1e-3, ge=0, description="Weight of the group lasso over what LoRA has at removed indices."
    )
