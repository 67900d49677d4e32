"""Tell a user what is wrong with a recipe, in the words of its settings."""

from __future__ import annotations

import re
from collections.abc import Collection

import pydantic

from pat_serve.errors import UsageError
from pat_serve.training.method_settings import meant

# Flags of pat-train that say where a run goes and how it begins, and not what it does.
_FLAGS = frozenset({"out", "resume", "config", "preset", "force", "debug"})


def recipe_error(error: pydantic.ValidationError, source: str, names: Collection[str]) -> UsageError:
    """The first fault that pydantic found, as an error for the user.

    Args:
        error: of the recipe's model.
        source: where the settings come from.
        names: of a recipe's own settings.
    """
    first = error.errors()[0]
    kind, given = first["type"], first.get("input")
    name = ".".join(str(part) for part in first["loc"] if part != "[key]") or "recipe"
    if kind == "extra_forbidden":
        fix = _way_out(name, names)
        return UsageError(f"{name} ({source})", expected="a setting of recipes", found="none of this name", fix=fix)
    if kind == "invalid_key":
        return UsageError(f"{name} ({source})", expected="a name", found=repr(given), fix="Write `name: value`.")
    if kind == "missing":
        return UsageError(f"{name} ({source})", expected="a value", found="none", fix="See pat-train --help.")
    told = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not first["loc"] and isinstance(given, dict):
        # Settings that do not go together: those that the message speaks of, and not the whole recipe.
        words = re.findall(r"\w+", told)
        found = ", ".join(f"{key} {value}" for key, value in given.items() if key in words) or "others"
        told, given = f"settings that go together ({told})", found
    else:
        told, given = told.lower(), repr(given)
    return UsageError(f"{name} ({source})", expected=told, found=given, fix="See pat-train --help.")


def _way_out(unknown: str, names: Collection[str]) -> str:
    """The place of a method's setting or of a flag, or the name that was probably meant."""
    from pat_serve.training.methods import METHODS

    owners = [f"`method: {method.name}`" for method in METHODS.values() if unknown in method.settings.model_fields]
    if owners:
        return f"Write it under settings; it goes with {' or '.join(owners)}."
    if unknown in _FLAGS:
        return f"It is a flag of pat-train: --{unknown}."
    return meant(unknown, names) + "Leave it out; pat-train --help names all settings."
