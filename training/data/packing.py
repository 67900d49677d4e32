"""Several examples in one row of the context's length, each with positions of its own, so that little is padding.

The rows carry position_ids that start at 0 with every sample, and no attention mask. From these transformers'
`create_causal_mask` builds a block-diagonal causal mask for sdpa and eager attention: no sample sees another, which
tests/test_packing.py holds it to. Its flash kernels read the borders off the positions for one row a batch alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.training.data.encoding import Example


def pack_examples(examples: Sequence[Example], max_length_tokens: int) -> list[Example]:
    """Best-fit-decreasing: the longest example first, each into the fullest row that has room for it.

    Args:
        examples: each of at most `max_length_tokens` tokens.
        max_length_tokens: of a packed row.

    Returns:
        rows of input_ids, labels and position_ids; the same for the same examples.
    """
    rows: list[list[Example]] = []
    room: dict[int, list[int]] = {}  # the rows by the tokens that they have left
    sizes: list[int] = []  # the keys of `room`, ascending
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        length = len(example["input_ids"])
        at = bisect_left(sizes, length)
        if at < len(sizes):
            left = sizes[at]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[at]
        else:
            left, row = max_length_tokens, len(rows)
            rows.append([])
        rows[row].append(example)
        if left - length not in room:
            room[left - length] = []
            insort(sizes, left - length)
        room[left - length].append(row)
    return [join(row) for row in rows]


def pack_stream(examples: Iterable[Example], max_length_tokens: int) -> Iterator[Example]:
    """Examples in the order in which they come, as many in a row as fit."""
    row: list[Example] = []
    length = 0
    for example in examples:
        if row and length + len(example["input_ids"]) > max_length_tokens:
            yield join(row)
            row, length = [], 0
        row.append(example)
        length += len(example["input_ids"])
    if row:
        yield join(row)


def join(examples: Sequence[Example]) -> Example:
    """One row of several samples. The first label of each is masked: the token before it belongs to another."""
    return {
        "input_ids": [token for example in examples for token in example["input_ids"]],
        "labels": [label for example in examples for label in (IGNORED_LABEL, *example["labels"][1:])],
        "position_ids": [position for example in examples for position in range(len(example["input_ids"]))],
    }
