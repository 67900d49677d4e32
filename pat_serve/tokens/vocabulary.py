"""A tokenizer's tokens, compared with the rows of a model's embedding.

A tokenizer to which tokens were added without resizing the model makes ids that have no row. The lookup of such an id
ends an engine, or a training with an IndexError. A model never makes such an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.errors import DataError

_NAMED = 4
_RESIZE = (
    "Resize the model (transformers: model.resize_token_embeddings(len(tokenizer))) and save it, or bring the "
    "tokenizer that belongs to it."
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids that a model can look up, and the tokens that its tokenizer can ask for.

    Attributes:
        rows: of the model's embedding; ids are 0 to rows - 1.
        rowless: the tokenizer's tokens without a row, by id.
    """

    rows: int
    rowless: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: Any, rows: int) -> Vocabulary:
        """Compare a tokenizer of transformers with an embedding."""
        beyond = {token_id: str(token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
        return cls(rows=rows, rowless=dict(sorted(beyond.items())))

    @property
    def warning(self) -> str | None:
        """A sentence about tokens without a row; None when there are no such tokens."""
        if not self.rowless:
            return None
        return (
            f"the tokenizer has {len(self.rowless)} tokens without a row in the model's embedding of {self.rows} rows: "
            f"{self.names(self.rowless)}; a text with one of them is refused"
        )

    def beyond(self, token_ids: Iterable[int]) -> list[int]:
        """Select the ids that have no row, each once."""
        return sorted({token_id for token_id in token_ids if not 0 <= token_id < self.rows})

    def names(self, token_ids: Iterable[int]) -> str:
        """Name tokens with their ids, for a message."""
        found = [f"{self.rowless.get(token_id, 'token')} ({token_id})" for token_id in token_ids]
        return ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} others" if len(found) > _NAMED else "")

    def require(self, token_ids: Iterable[int], subject: str) -> None:
        """Check that all ids of a text have a row.

        Args:
            token_ids: of the text.
            subject: the text, for the message.

        Raises:
            DataError: an id has no row.
        """
        if found := self.beyond(token_ids):
            raise DataError(
                subject,
                expected=f"token ids below {self.rows}, the rows of the model's embedding",
                found=self.names(found),
                fix=_RESIZE,
            )


def vocabulary_of(folder: Path, rows: int) -> Vocabulary | None:
    """Compare a folder's tokenizer with a model's rows; None where no tokenizer loads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The libraries raise many types, pyo3's own among them. The code that needs the tokenizer tells what is wrong.
    except Exception:
        return None
    return Vocabulary.of(tokenizer, rows)
