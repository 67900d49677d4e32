"""Pruning methods by name. A NEW METHOD is one file beside this one and one line in METHODS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pat_serve.errors import UsageError
from pat_serve.training.methods.atp.method import Atp
from pat_serve.training.methods.base import Method
from pat_serve.training.methods.cut import Cut
from pat_serve.training.methods.layers import Layers
from pat_serve.training.methods.llm_pruner import LlmPruner
from pat_serve.training.methods.lora import LoraOnly
from pat_serve.training.methods.one_shot import OneShot
from pat_serve.training.methods.pat.method import Pat
from pat_serve.training.methods.search.method import Search
from pat_serve.training.methods.spp import Spp

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Pat, Cut, LlmPruner, Layers, Atp, Search, LoraOnly, OneShot, Spp)
}

__all__ = ["METHODS", "Method", "method_of"]


def method_of(recipe: TrainRecipe) -> type[Method]:
    """The method that a recipe names.

    Raises:
        UsageError: there is none of that name.
    """
    found = METHODS.get(recipe.method)
    if found is None:
        raise UsageError("--method", expected=" or ".join(METHODS), found=recipe.method, fix="Choose one of them.")
    return found
