"""A recipe as a YAML file: read for flags to be laid over it, and written into a run's folder."""

from __future__ import annotations

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
