"""A grid of batches and prompts, and the regimes of it that a claim names. Pure."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from pat_serve.errors import UsageError


class Regime(StrEnum):
    """The two phases of generation; they meet different limits, so each gets its own verdict."""

    PREFILL = "prefill"
    DECODE = "decode"


class Cell(BaseModel):
    """One point of a grid: so many requests at once, each with so many prompt tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)

    def __str__(self) -> str:
        """The cell as a flag has it: 8x1024."""
        return f"{self.batch_size}x{self.prompt_tokens}"


class Named(BaseModel):
    """A part of the grid that a claim is about: a cell, and one phase or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cell: Cell
    regime: Regime | None = None

    def __str__(self) -> str:
        """The part as a flag has it: 8x1024 or 8x1024:decode."""
        return str(self.cell) if self.regime is None else f"{self.cell}:{self.regime.value}"

    def holds(self, regime: Regime, cell: Cell) -> bool:
        """Whether a phase of a cell belongs to it."""
        return cell == self.cell and self.regime in (None, regime)


def parse_grid(text: str, flag: str) -> tuple[Cell, ...]:
    """Read cells such as 1x128,8x1024; each counts once, in the order given.

    Raises:
        UsageError: the text is anything else.
    """
    return tuple(dict.fromkeys(_cell(word, flag) for word in text.split(",")))


def parse_named(text: str, flag: str) -> tuple[Named, ...]:
    """Read parts of a grid such as 8x1024,1x128:decode.

    Raises:
        UsageError: the text is anything else.
    """
    found = []
    for word in text.split(","):
        cell, _, phase = word.partition(":")
        if phase and phase not in list(Regime):
            raise UsageError(flag, expected="prefill or decode after a colon", found=word, fix=f"Try {flag} {cell}.")
        found.append(Named(cell=_cell(cell, flag), regime=Regime(phase) if phase else None))
    return tuple(dict.fromkeys(found))


def _cell(word: str, flag: str) -> Cell:
    batch, _, prompt = word.strip().partition("x")
    if not (batch.isdecimal() and prompt.isdecimal() and int(batch) and int(prompt)):
        raise UsageError(
            flag, expected="requests x prompt tokens, as 1x128,8x1024", found=repr(word), fix=f"Try {flag} 1x128."
        )
    return Cell(batch_size=int(batch), prompt_tokens=int(prompt))
