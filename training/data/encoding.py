"""Text becomes token ids whose loss covers the response alone, and examples become batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_serve.errors import DataError, MissingModel, UsageError, first_line
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.terminal.progress import track
from pat_serve.tokens.habits import no_ids, token_habit
from pat_serve.training.data.remarks import Remarks
from pat_serve.training.data.row import Row, Tokenizer

Example = dict[str, list[int]]
# A completion is put after these where the prompt does not tell which ids it has in the middle of a text.
_NEUTRAL = (":", "a", "\n")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model.

    Raises:
        MissingModel: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise MissingModel(
            folder,
            expected="a tokenizer beside the model",
            found=first_line(error),
            fix="Copy its tokenizer files too.",
        ) from error


class PadBatch:
    """Collates encoded or packed rows into a padded batch.

    The padding id is any valid one, for nothing attends to it and its label does not count: Llama-2's tokenizer names
    none.
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad on the right to the longest row.

        Returns:
            input_ids and labels of shape (batch, longest), and either attention_mask or, of packed rows, position_ids:
            these start at 0 with every sample, and the padding is a sample of its own. There must be no attention_mask
            beside them, for transformers then reads the samples' borders off them and lets none attend to another.
        """
        longest = max(len(example["input_ids"]) for example in examples)
        missing = [longest - len(example["input_ids"]) for example in examples]
        columns = {
            "input_ids": [[0] * count for count in missing],
            "labels": [[IGNORED_LABEL] * count for count in missing],
        }
        if "position_ids" in examples[0]:
            columns["position_ids"] = [list(range(count)) for count in missing]
        else:
            columns["attention_mask"] = [[0] * count for count in missing]
        return {
            name: torch.tensor([example[name] + fill for example, fill in zip(examples, fills, strict=True)])
            for name, fills in columns.items()
        }


class RowEncoder:
    """Encodes rows with one tokenizer, and says once what is odd about it.

    Args:
        tokenizer: of the base.
        max_length_tokens: what is longer is cut off.

    Attributes:
        ends: the special tokens that the answers so far end with.
    """

    def __init__(self, tokenizer: Tokenizer, max_length_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_length_tokens = max_length_tokens
        self._habit = token_habit(tokenizer)
        self._remarks = Remarks("the tokenizer")
        self.ends: set[int] = set()
        if self._habit.end:
            self._remarks.once(
                "it ends every text, and so a server's prompts too, with special tokens; set add_eos_token to false in "
                "tokenizer_config.json"
            )

    def encode(self, row: Row) -> Example | None:
        """Token ids and labels of one example, labels on the completion and its end alone.

        A plain prompt begins with what the tokenizer puts before a text by itself, and the completion ends with the end
        of text; one that somebody typed there is not doubled. A chat's prompt begins and its answer ends as its
        template has it.

        Returns:
            input_ids, attention_mask and labels of at most `max_length_tokens`; None when the prompt leaves no room for
            the response and nothing of the prompt counts.
        """
        start = [] if row.chat else self._habit.start
        prompt_text = row.prompt if row.chat else self._habit.without_start(row.prompt)
        completion_text = row.completion if row.ended else self._without_typed_end(row.completion)
        try:
            prompt, completion = split_ids(self._tokenizer, prompt_text, completion_text)
        # The libraries raise bare exceptions.
        except Exception as error:
            raise no_ids(self._tokenizer, error) from error
        self._remark_unknown(row, [*prompt, *completion])
        prompt_labels = self._prompt_labels(row, prompt)
        prompt, prompt_labels = [*start, *prompt], [IGNORED_LABEL] * len(start) + prompt_labels
        if not row.ended:
            completion = [*completion, *self._end(row)]
        self._note_end(completion)
        if len(prompt) >= self._max_length_tokens and not row.learned:
            return None
        input_ids = (prompt + completion)[: self._max_length_tokens]
        labels = (prompt_labels + completion)[: self._max_length_tokens]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    def _note_end(self, completion: list[int]) -> None:
        """Keep what answers end with, for who serves the model; a token that is no special one may be a word."""
        token = self._tokenizer.added_tokens_decoder.get(completion[-1]) if completion else None
        if getattr(token, "special", False):
            self.ends.add(completion[-1])

    def _prompt_labels(self, row: Row, prompt: list[int]) -> list[int]:
        """Labels of a prompt: its ids where the row's earlier answers stand.

        A token that spans the start of an answer counts, one that spans its end does not.
        """
        labels = [IGNORED_LABEL] * len(prompt)
        for span in row.learned:
            before = (self._tokenizer.encode(row.prompt[:at], add_special_tokens=False) for at in span)
            start, stop = (_common_prefix(ids, prompt) for ids in before)
            labels[start:stop] = prompt[start:stop]
        return labels

    def _without_typed_end(self, completion: str) -> str:
        """A response without the end of text that somebody typed after it: the token itself follows."""
        end = self._tokenizer.eos_token
        while end and completion.rstrip().endswith(end):
            completion = completion.rstrip().removesuffix(end)
        return completion

    def _remark_unknown(self, row: Row, ids: list[int]) -> None:
        """Say once that a part of the rows is trained as the unknown token."""
        token, token_id = self._tokenizer.unk_token, self._tokenizer.unk_token_id
        if token is not None and token_id in ids and token not in row.prompt + row.completion:
            self._remarks.once(f"it has no token for a part of these texts, which is trained as {token}")

    def _end(self, row: Row) -> list[int]:
        if self._tokenizer.eos_token_id is not None:
            return [self._tokenizer.eos_token_id]
        tokens = (str(token) for token in self._tokenizer.added_tokens_decoder.values())
        if not row.completion.rstrip().endswith(tuple(tokens)):
            self._remarks.once(
                "it names no end token, so the training does not show where a response ends; set eos_token in "
                "tokenizer_config.json"
            )
        return []


def encode_row(row: Row, tokenizer: Tokenizer, max_length_tokens: int) -> Example | None:
    """Encode one row to an example, as `RowEncoder.encode` does; None where it has nothing to learn."""
    return RowEncoder(tokenizer, max_length_tokens).encode(row)


def split_ids(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of what follows it, encoded as one text.

    The prompt's are those that it has alone, because a server sends these and the model goes on from there. Mostly the
    ids of both together begin with them. Where a token would span the boundary (after a prompt that ends with a space,
    for one), the completion gets the ids that it has in the middle of another text.

    Returns:
        both without special tokens. Where a tokenizer's ids depend on the text before in every case tried, the ids of
        both together are split where they differ from the prompt's: the spanning token belongs to the completion, whose
        first characters would not be learned otherwise.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + completion, add_special_tokens=False)
    common = _common_prefix(before, whole)
    if common == len(before):
        return before, whole[common:]
    for text in (prompt.rstrip(), *_NEUTRAL):
        alone = tokenizer.encode(text, add_special_tokens=False)
        together = tokenizer.encode(text + completion, add_special_tokens=False)
        # A text without ids of its own leaves the completion at a start, not in the middle of a text.
        if alone and together[: len(alone)] == alone:
            return before, together[len(alone) :]
    return whole[:common], whole[common:]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def has_label(example: Example) -> bool:
    """At least one token of it counts in the loss (the first never does: nothing precedes it)."""
    return any(label != IGNORED_LABEL for label in example["labels"][1:])


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length_tokens: int, ends: set[int] | None = None
) -> tuple[list[Example], int]:
    """Encode all rows.

    Args:
        rows: of a source.
        tokenizer: of the base.
        max_length_tokens: of an example.
        ends: takes the special tokens that answers end with.

    Returns:
        the examples, and how many rows were left out because nothing of their response is within the length.

    Raises:
        UsageError: no row fits.
        DataError: rows fit, but no token of a response remains to be learned.
    """
    encoder = RowEncoder(tokenizer, max_length_tokens)
    encoded = [encoder.encode(row) for row in track(rows, "tokenize", len(rows))]
    if ends is not None:
        ends |= encoder.ends
    fitting = [example for example in encoded if example is not None]
    examples = [example for example in fitting if has_label(example)]
    if not fitting:
        raise UsageError(
            "--max-length-tokens",
            expected="room for at least one row's prompt and response",
            found=f"{max_length_tokens} tokens, all filled by the prompts",
            fix="Raise it.",
        )
    if not examples:
        raise DataError(
            "--data",
            expected="at least one response with a token in it",
            found=f"every label of {len(fitting)} rows masked",
            fix="Check the responses and the tokenizer, which made no token of them.",
        )
    return examples, len(encoded) - len(examples)
