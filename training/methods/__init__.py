"""Pruning methods by name. A NEW METHOD is one file beside this one and one line in METHODS."""

from pat_serve.training.methods.base import Method
from pat_serve.training.methods.lora import LoraOnly
from pat_serve.training.methods.pat.method import Pat

METHODS: dict[str, type[Method]] = {method.name: method for method in (Pat, LoraOnly)}

__all__ = ["METHODS", "Method"]
