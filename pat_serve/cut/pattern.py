"""The pattern that a weight's zeros have: N of every M entries of a row stay (N:M), or any share of all entries."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

UNSTRUCTURED = "unstructured"
# More zeros than this leave no model, whatever makes up for them.
LARGEST_SPARSITY = 0.95
# All sets that may go are tried: 70 for 4:8, and 12,870 for 8:16.
_LONGEST_GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Where zeros may stand.

    Attributes:
        kept: N, entries of a group that stay.
        group: M, entries of a group; 0 for an unstructured pattern, which has no groups.
    """

    kept: int = 0
    group: int = 0

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read `2:4`, or `unstructured`.

        Raises:
            ValueError: it is neither, or a group that keeps all or none.
        """
        if text == UNSTRUCTURED:
            return Pattern()
        found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
        kept, group = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < group <= _LONGEST_GROUP:
            raise ValueError(
                f"{UNSTRUCTURED}, or N:M with N entries kept of M, N below M and M at most {_LONGEST_GROUP}"
            )
        return Pattern(kept=kept, group=group)

    @property
    def sparsity(self) -> float | None:
        """Share of zeros that the groups give; None where the pattern leaves it open."""
        return 1 - self.kept / self.group if self.group else None

    def held_by(self, weight_OI: Tensor) -> bool:
        """Whether a weight has as many zeros in each group as the pattern asks; always, where there are no groups."""
        if not self.group:
            return True
        rows, inputs = weight_OI.shape
        if inputs % self.group:
            return False
        counts = (weight_OI != 0).view(rows, inputs // self.group, self.group).sum(-1)
        return bool((counts <= self.kept).all())
