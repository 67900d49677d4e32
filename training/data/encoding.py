"""Text becomes token ids whose loss covers the response alone, and examples become batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_serve.errors import DataError, MissingModel, UsageError, first_line
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.progress import track
from pat_serve.training.data.rows import Row, Tokenizer

Example = dict[str, list[int]]


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


def encode_row(row: Row, tokenizer: Tokenizer, max_length_tokens: int) -> Example | None:
    """Token ids and labels of one example: <s> prompt completion </s>, labels on the completion and </s> alone.

    A chat's prompt begins and its answer ends as its template has it.

    Returns:
        input_ids, attention_mask and labels of at most `max_length_tokens`; None when the prompt leaves no room for the
        response.
    """
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and not row.chat else []
    prompt = start + tokenizer.encode(row.prompt, add_special_tokens=False)
    completion = tokenizer.encode(row.completion, add_special_tokens=False)
    if tokenizer.eos_token_id is not None and not row.ended:
        completion = [*completion, tokenizer.eos_token_id]
    if len(prompt) >= max_length_tokens:
        return None
    input_ids = (prompt + completion)[:max_length_tokens]
    labels = ([IGNORED_LABEL] * len(prompt) + completion)[:max_length_tokens]
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def has_label(example: Example) -> bool:
    """At least one token of it counts in the loss (the first never does: nothing precedes it)."""
    return any(label != IGNORED_LABEL for label in example["labels"][1:])


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, max_length_tokens: int) -> tuple[list[Example], int]:
    """Encode all rows.

    Returns:
        the examples, and how many rows were left out because nothing of their response is within the length.

    Raises:
        UsageError: no row fits.
        DataError: rows fit, but no token of a response remains to be learned.
    """
    encoded = [encode_row(row, tokenizer, max_length_tokens) for row in track(rows, "tokenize", len(rows))]
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
