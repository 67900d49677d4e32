"""The recipes in recipes/: each parses, and asks for a width that its model can have and stock classes load."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from pat_serve.families.architectures import FAMILIES
from pat_serve.shapes.geometry import check_width, width_step
from pat_serve.training.config import TrainRecipe
from pat_serve.training.recipe_file import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
# model_type, hidden_size, query heads, head_dim, tied: from the models' published config.json.
MODELS = {
    "llama-2-7b": ("llama", 4096, 32, 128, False),
    "llama-3.1-8b": ("llama", 4096, 32, 128, False),
    "llama-3.2-1b": ("llama", 2048, 32, 64, True),
    "yi-6b": ("llama", 4096, 32, 128, False),
    "mistral-7b": ("mistral", 4096, 32, 128, False),
    "qwen2.5-7b": ("qwen2", 3584, 28, 128, False),
    "qwen3-8b": ("qwen3", 4096, 32, 128, False),
    "gemma-2b": ("gemma", 2048, 8, 256, True),
    "gemma-7b": ("gemma", 3072, 16, 256, True),
    "phi-3-mini": ("phi3", 3072, 32, 96, False),
}


def test_every_recipe_is_in_the_table():
    assert {path.stem for path in RECIPES.iterdir()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_legal_for_its_model(name: str):
    model_type, hidden_size, heads, head_dim, tied = MODELS[name]
    path = RECIPES / f"{name}.yaml"
    recipe = TrainRecipe.build(read_recipe(path), str(path))
    family = FAMILIES[model_type]
    rule = family.hidden_multiple_of_heads
    assert recipe.hidden_size is not None
    width = check_width(recipe.hidden_size, hidden_size, heads, hidden_multiple_of_heads=rule)
    # A quarter, as the paper cuts; a multiple that kernels like.
    assert 4 * width == 3 * hidden_size
    assert width % width_step(hidden_size, heads, hidden_multiple_of_heads=rule) == 0
    assert recipe.resolved(tied=tied).rotate == "loss"
    exported = family.export_as.model_type if family.export_as else model_type
    config = CONFIG_MAPPING[exported](hidden_size=width, num_attention_heads=heads, head_dim=head_dim)
    assert (config.hidden_size, config.head_dim) == (width, head_dim)
