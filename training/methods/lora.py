"""LoRA alone: the dense baseline with the same budget. Its plan keeps everything."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pat_serve.training.methods.base import Method
from pat_serve.training.methods.pat.settings import PatSettings


class LoraOnly(Method):
    """Nothing beside LoRA; exports to the base's own shape with the adapter merged."""

    name: ClassVar[str] = "lora"
    prunes: ClassVar[bool] = False
    axes: ClassVar[frozenset[str]] = frozenset()
    unused: ClassVar[frozenset[str]] = frozenset(
        {
            *PatSettings.model_fields,
            "ratio",
            "hidden_size",
            "shape",
            "choose",
            "compensate",
            "refit",
            "refit_shrinkage",
            "narrow",
        }
        | {"calibration_rows"}
    )
    why_unused: ClassVar[str] = "prunes nothing"

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Leave the model as it is: the LoRA modules are peft's."""

    def modules(self) -> dict[str, nn.Module]:
        """No modules: peft saves the adapter."""
        return {}
