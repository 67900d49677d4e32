"""A flag wins over a file's setting, and over the file's other way to say the same."""

from __future__ import annotations

from typing import Any

import pytest

from pat_serve.training.config import TrainRecipe
from pat_serve.training.recipe_file import overridden

FILE = {"ratio": 0.25, "axes": "layers", "max_steps": 5, "settings": {"mask": "S"}}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"shape": "layers=3"}, {"shape": "layers=3", "max_steps": 5, "settings": {"mask": "S"}}),
        ({"hidden_size": 48}, {"hidden_size": 48, "max_steps": 5, "settings": {"mask": "S"}}),
        ({"ratio": 0.5}, FILE | {"ratio": 0.5}),
        ({"epochs": 2.0}, {key: FILE[key] for key in ("ratio", "axes", "settings")} | {"epochs": 2.0}),
        ({"axes": "ffn"}, FILE | {"axes": "ffn"}),
        ({"refine": "dsnot"}, FILE | {"settings": {"mask": "S", "refine": "dsnot"}}),
    ],
)
def test_what_a_flag_replaces(flags: dict[str, Any], expected: dict[str, Any]) -> None:
    assert overridden(FILE, flags, TrainRecipe.model_fields) == expected


def test_two_flags_that_exclude_each_other_both_stay_for_the_recipe_to_refuse() -> None:
    flags = {"ratio": 0.25, "shape": "layers=3"}
    assert overridden({}, flags, TrainRecipe.model_fields) == flags
