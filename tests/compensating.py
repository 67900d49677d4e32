"""Compensation as `make_ready` calls it where the stream alone is cut."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from pat_serve.training.methods import Method
from pat_serve.training.model.compensation import Compensated, compensate


def make_up(
    model: Any, method: Method, batches: list[dict[str, Tensor]], refit: Literal["lora", "full"] = "lora"
) -> Compensated:
    """Make up for the channels that a method has closed."""
    return compensate(
        model,
        method,
        batches,
        kept_K=method.kept_channels(),
        layers=range(method.base.layers),
        counts={},
        choices={},
        known={},
        refit=refit,
    )
