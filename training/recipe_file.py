"""A recipe as a YAML file: read for flags to be laid over it, and written into a run's folder."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml

from pat_serve.errors import UsageError, first_line
from pat_serve.files.atomic import write_text
from pat_serve.run.folder import RECIPE_FILE


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked, for flags to be laid over them.

    Raises:
        UsageError: the file is missing or is not a YAML mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            path, expected="a YAML recipe", found=first_line(error), fix="Check the path and its content."
        ) from error
    if not isinstance(settings, dict):
        raise UsageError(
            path, expected="a YAML mapping", found=type(settings).__name__, fix="Write one `name: value` a line."
        )
    return settings


def write_recipe(run: Path, settings: dict[str, Any]) -> None:
    """Write the settings to recipe.yaml in a run's folder, in their order, complete or not at all."""
    write_text(run / RECIPE_FILE, yaml.safe_dump(settings, sort_keys=False))


def overridden(settings: dict[str, Any], flags: dict[str, Any], fields: Container[str]) -> dict[str, Any]:
    """Put flags over the settings of a file or a preset.

    A flag also wins over the file's other way to say the same: `--shape` over `ratio`, `--epochs` over `max_steps`.

    Args:
        settings: of a file or a preset.
        flags: those that were given.
        fields: names of a recipe's own settings; other flags are settings of the method.
    """
    sizes = {"ratio", "speedup", "hidden_size", "shape"}
    others = {one: sizes | {"axes", "search_minutes"} for one in ("hidden_size", "shape")}
    others |= {"ratio": sizes, "speedup": sizes, "axes": {"hidden_size", "shape"}, "epochs": {"max_steps"}}
    replaced = set().union(*(others[one] for one in others.keys() & flags.keys())) - flags.keys()
    kept = {name: value for name, value in settings.items() if name not in replaced}
    of_the_method = {name: flags[name] for name in sorted(flags) if name not in fields}
    merged = kept | {name: value for name, value in flags.items() if name in fields}
    return merged | ({"settings": kept.get("settings", {}) | of_the_method} if of_the_method else {})
