"""Packages that only some commands need. A missing one is refused with the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec

from pat_serve.errors import MissingExtra


def require(module: str, *extras: str, wanted_by: str, otherwise: str = "") -> None:
    """Refuse a command or flag whose package is not installed; nothing is imported.

    Args:
        module: name of the package's module.
        extras: extras of this package that bring the module; one is enough.
        wanted_by: the command or flag that needs the module.
        otherwise: the way to do without, as the end of a sentence after "or".

    Raises:
        MissingExtra: the package is not installed.
    """
    if find_spec(module) is not None:
        return
    commands = " or ".join(f'"pat-serve[{extra}]"' for extra in extras)
    raise MissingExtra(
        wanted_by,
        expected=f"the packages of the {' or '.join(extras)} extra",
        found=f"no module {module}",
        fix=f"Install them: pip install {commands}{otherwise and f', or {otherwise}'}.",
    )
