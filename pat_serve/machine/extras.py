"""Packages that only some commands need: whether they are there, and the way to them."""

from __future__ import annotations

from importlib.util import find_spec

from pat_serve.errors import MissingExtra


def require(module: str, *extras: str, wanted_by: str, otherwise: str = "") -> None:
    """Refuse what needs a package that is not installed; nothing is imported.

    Args:
        module: name of the package's module.
        extras: those of this package that bring it, of which one is enough.
        wanted_by: the command or flag that needs it.
        otherwise: the way to do without, as the end of a sentence after "or".

    Raises:
        MissingExtra: it is not installed.
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
