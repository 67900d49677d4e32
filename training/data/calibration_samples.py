"""How many training examples the base is measured on, and the refit sees."""

from __future__ import annotations

from collections.abc import Sequence

from pat_serve.training.data.encoding import Example

# Where nobody says: so many rows, or as many as have so many tokens, and no fewer than a least number. On SmolLM2 the
# gain of a doubling lasts up to here (docs/study.md); the states of all their tokens are in memory at once.
MOST_ROWS = 512
MOST_TOKENS = 131_072
FEWEST_ROWS = 128


def calibration_samples(examples: Sequence[Example], asked: int | None) -> list[Example]:
    """The first examples: as many as were asked for, or the default's number; all of them where there are fewer."""
    if asked is not None:
        return list(examples[:asked])
    tokens = 0
    for rows, example in enumerate(examples[:MOST_ROWS]):
        tokens += len(example["input_ids"])
        if rows >= FEWEST_ROWS and tokens > MOST_TOKENS:
            return list(examples[:rows])
    return list(examples[:MOST_ROWS])
