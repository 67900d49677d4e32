"""The templates of routes, for labels: a client can send any path, and must not make a label of each."""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHER = "other"
# The name for connections that were refused before there was a path.
UNPARSED = "unparsed"


class RouteNames:
    """Maps each path to one of a fixed set of names.

    Args:
        templates: paths of all routes, with their parameters in braces.
    """

    def __init__(self, templates: Iterable[str]) -> None:
        known = set(templates)
        self._plain = {template for template in known if "{" not in template}
        self._patterns = [(_pattern(template), template) for template in sorted(known - self._plain)]

    def name(self, path: str) -> str:
        """The route's template, or "other"."""
        if path in self._plain:
            return path
        return next((template for pattern, template in self._patterns if pattern.fullmatch(path)), OTHER)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{[^}:]*(:path)?\}", template)
    # re.split gives the text and the matched group in turn.
    return re.compile(
        "".join(
            re.escape(part or "") if index % 2 == 0 else (".+" if part else "[^/]+") for index, part in enumerate(parts)
        )
    )
