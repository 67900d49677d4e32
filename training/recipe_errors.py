"""What is wrong with a recipe, in the words of its settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

import pydantic

from pat_serve.errors import UsageError


def recipe_error(error: pydantic.ValidationError, source: str, names: Iterable[str]) -> UsageError:
    """The first fault that pydantic found, as an error for the user.

    Args:
        error: of the recipe's model.
        source: where the settings come from.
        names: of a recipe's own settings.
    """
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "recipe"
    told, given = first["msg"].removeprefix("Value error, ").lower(), first.get("input")
    if first["type"] == "extra_forbidden":
        fix = _way_out(name, [*names])
        return UsageError(f"{name} ({source})", expected="a setting of recipes", found="none of this name", fix=fix)
    found = "no value" if first["type"] == "missing" else repr(given)
    if not first["loc"] and isinstance(given, dict):
        # Settings that do not go together: those that the message speaks of, and not the whole recipe.
        words = re.findall(r"\w+", told)
        found = ", ".join(f"{key} {value}" for key, value in given.items() if key in words) or "others"
    return UsageError(f"{name} ({source})", expected=told, found=found, fix="See pat-train --help.")


def _way_out(unknown: str, names: list[str]) -> str:
    """The place of a method's setting, or the name that was probably meant."""
    from pat_serve.training.methods import METHODS

    owners = [method.name for method in METHODS.values() if unknown in method.settings.model_fields]
    if owners:
        return f"It belongs to {', '.join(f'method {one}' for one in owners)}: write it under settings, beside method."
    near = get_close_matches(unknown, names, n=1)
    return f"Did you mean {near[0]}?" if near else "Leave it out; pat-train --help names all settings."
