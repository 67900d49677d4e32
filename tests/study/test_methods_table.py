"""The table of methods: every row is a recipe that its method takes, and has its line."""

from __future__ import annotations

import pytest

from benchmarks.methods.making import shared_by
from benchmarks.methods.rows import DENSE, ROWS
from benchmarks.methods.table import table
from pat_serve.cut.axes import HIDDEN
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import METHODS, method_of


def recipe_of(name: str) -> TrainRecipe:
    row = ROWS[name]
    return TrainRecipe.build({"model": "m", "data": "d", **shared_by(row, 20), **row.recipe}, name)


@pytest.mark.parametrize("name", [name for name in ROWS if name != DENSE])
def test_a_row_asks_for_what_its_method_takes(name: str):
    recipe = recipe_of(name)
    method = method_of(recipe)
    recipe.resolved(tied=True, prunes=method.prunes, narrows=HIDDEN in method.axes)
    assert set(recipe.shape) <= method.axes
    assert ROWS[name].trains == (method.trains and recipe.max_steps != 0)


def test_every_method_has_a_row():
    assert {recipe_of(name).method for name in ROWS if name != DENSE} == set(METHODS)


def test_a_row_that_begins_with_another_comes_after_it():
    names = list(ROWS)
    for name, row in ROWS.items():
        assert row.base is None or names.index(row.base) < names.index(name)


def test_zeros_are_told_to_bring_no_speed():
    row = {
        "name": "one-shot, 2:4",
        "axes": "zeros",
        "trains": False,
        "source": "arXiv",
        "train_s": 90.0,
        "parameters": 134_515_008,
        "zeros": 0.5,
        "decode_bytes": 2.5e8,
        "measures": {
            "ppl(wikitext2)": 30.123,
            "acc(arc_easy)": 0.5,
            "acc(pat14_ll)": 0.4,
            "acc_norm(pat14_ll)": 0.45,
            "answer_nll(pat14_ll)": 18.258,
        },
    }
    [_, _, line] = table([row]).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "one-shot, 2:4", "zeros", "no", "1.5", "134.5 M", "50%", "250 MB", "30.12", "0.400", "18.26",
        "1x: zeros are computed",
        "arXiv",
    ]  # fmt: skip
