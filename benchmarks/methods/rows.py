"""The rows of the table: what each method is asked for. A NEW ROW is one entry of ROWS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The sizes are those of SmolLM2-135M: each cut below leaves about three quarters of it.
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at one size.

    Attributes:
        axes: what it makes smaller, in words.
        trains: there are optimizer steps.
        source: where the method comes from.
        recipe: entries of pat-train's recipe beside those that all rows share.
        base: name of the row whose export it begins with; None for the dense model.
    """

    axes: str
    trains: bool
    source: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


DENSE = "dense"
_CUT = {"max_steps": 0}
# pat-train's default for the width of this model, which came after the other rows (docs/study_recovery.md).
OF_THE_WIDTH = 1.3e-3
# These rows of the table see as many examples as the others, two in a step.
SMALL_STEPS: dict[str, Any] = {"learning_rate": OF_THE_WIDTH, "batch_size": 2}
ROWS: dict[str, Row] = {
    DENSE: Row(axes="none", trains=False, source="the model as it is"),
    "lora": Row(axes="none", trains=True, source="arXiv 2106.09685", recipe={"method": "lora"}),
    "pat": Row(axes="hidden", trains=True, source="arXiv 2408.14721", recipe={"hidden_size": 432}),
    "cut, FFN": Row(axes="FFN", trains=True, source="arXiv 2407.14679", recipe={"shape": {"ffn": 896}}),
    "cut, layers and FFN": Row(
        axes="layers, FFN", trains=True, source="arXiv 2407.14679", recipe={"shape": {"layers": 24, "ffn": 1280}}
    ),
    "cut, layers and FFN, no step": Row(
        axes="layers, FFN",
        trains=False,
        source="arXiv 2505.02819",
        recipe={"shape": {"layers": 24, "ffn": 1280}, **_CUT},
    ),
    "one-shot, 50 %": Row(
        axes="zeros",
        trains=False,
        source="arXiv 2410.15567",
        recipe={"method": "one-shot", "settings": {"sparsity": 0.5}},
    ),
    "one-shot, 2:4": Row(
        axes="zeros",
        trains=False,
        source="arXiv 2410.15567",
        recipe={"method": "one-shot", "settings": {"pattern": "2:4"}},
    ),
    "one-shot, 50 %, alpha, dsnot": Row(
        axes="zeros",
        trains=False,
        source="arXiv 2410.10912, 2310.08915",
        recipe={
            "method": "one-shot",
            "settings": {
                "sparsity": 0.5,
                "allocation": "alpha",
                "mask": "wanda",
                "compensation": "none",
                "refine": "dsnot",
            },
        },
    ),
    "llm-pruner": Row(
        axes="FFN, groups",
        trains=True,
        source="arXiv 2305.11627",
        recipe={"method": "llm-pruner", "shape": {"ffn": 1088, "kv_groups": 2}},
    ),
    "layers": Row(axes="layers", trains=True, source="arXiv 2411.15558", recipe={"method": "layers"}),
    "layers, influence": Row(
        axes="layers",
        trains=True,
        source="arXiv 2403.03853",
        recipe={"method": "layers", "choose": {"layers": "influence"}},
    ),
    "layers, influence, LoRA": Row(
        axes="layers",
        trains=True,
        source="arXiv 2403.03853, 2106.09685",
        recipe={"method": "layers", "choose": {"layers": "influence"}, "train": "lora", "train_norms": False},
    ),
    "atp": Row(axes="FFN", trains=True, source="arXiv 2412.14426", recipe={"method": "atp", "shape": {"ffn": 896}}),
    "search": Row(
        axes="layers, FFN",
        trains=True,
        source="arXiv 2409.17372",
        recipe={"method": "search", "shape": {"layers": 24, "ffn": 1280}, "settings": {"generations": 8}},
    ),
    "spp": Row(
        axes="zeros",
        trains=True,
        source="arXiv 2405.16057",
        recipe={"method": "spp", "learning_rate": 4e-3},
        base="one-shot, 2:4",
    ),
    "lora, 1.3e-3": Row(
        axes="none", trains=True, source="arXiv 2106.09685", recipe={"method": "lora", "learning_rate": OF_THE_WIDTH}
    ),
    "pat, 1.3e-3": Row(
        axes="hidden",
        trains=True,
        source="arXiv 2408.14721",
        recipe={"hidden_size": 432, "learning_rate": OF_THE_WIDTH},
    ),
    "cut, FFN, 1.3e-3": Row(
        axes="FFN",
        trains=True,
        source="arXiv 2407.14679",
        recipe={"shape": {"ffn": 896}, "learning_rate": OF_THE_WIDTH},
    ),
    "cut, layers and FFN, 1.3e-3": Row(
        axes="layers, FFN",
        trains=True,
        source="arXiv 2407.14679",
        recipe={"shape": {"layers": 24, "ffn": 1280}, "learning_rate": OF_THE_WIDTH},
    ),
    "lora, small steps": Row(
        axes="none", trains=True, source="arXiv 2106.09685", recipe={"method": "lora", **SMALL_STEPS}
    ),
    "cut, layers, small steps": Row(
        axes="layers", trains=True, source="arXiv 2403.03853", recipe={"shape": {"layers": 21}, **SMALL_STEPS}
    ),
    "cut, layers and FFN, small steps": Row(
        axes="layers, FFN",
        trains=True,
        source="arXiv 2407.14679",
        recipe={"shape": {"layers": 24, "ffn": 1280}, **SMALL_STEPS},
    ),
    "cut, layers and FFN, small steps, distilled": Row(
        axes="layers, FFN",
        trains=True,
        source="arXiv 2407.14679",
        recipe={"shape": {"layers": 24, "ffn": 1280}, "distillation_weight": 0.5, **SMALL_STEPS},
    ),
}
