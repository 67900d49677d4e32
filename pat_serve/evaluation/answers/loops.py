"""When does an answer repeat itself? Pure functions of its token ids."""

from __future__ import annotations

from collections.abc import Sequence

# Holtzman et al. 2020 ("The Curious Case of Neural Text Degeneration"; metrics/repetition.py of their code) look at the
# phrase of up to 90 tokens that a text ends with most times in a row. The text is in a loop if there are at least two,
# and the phrase has at least 3 tokens or comes more than 50 times.
LONGEST_PHRASE_TOKENS = 90
_LEAST_PHRASE_TOKENS = 3
_MOST_SHORT_PHRASES = 50
# Welleck et al. 2020 ("Neural Text Generation with Unlikelihood Training"): seq-rep-4.
GRAM_TOKENS = 4


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Tell whether an answer ends in a loop, by Holtzman et al.'s definition.

    Args:
        ids: the answer without an end token.
    """
    times = [_times(ids, length) for length in range(1, LONGEST_PHRASE_TOKENS + 1)]
    most = max(times)
    length = times.index(most) + 1
    return most > 1 and (length >= _LEAST_PHRASE_TOKENS or most > _MOST_SHORT_PHRASES)


def repeated_share(ids: Sequence[int]) -> float:
    """Share of an answer's 4-grams that were there before (seq-rep-4); 0 for fewer than 4 tokens."""
    grams = [tuple(ids[at : at + GRAM_TOKENS]) for at in range(len(ids) - GRAM_TOKENS + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def common_start(first: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before two answers differ."""
    alike = next((at for at, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), None)
    return min(len(first), len(other)) if alike is None else alike


def _times(ids: Sequence[int], length: int) -> int:
    """How many times in a row the last `length` tokens stand at the end."""
    phrase = list(ids[len(ids) - length :])
    if len(phrase) < length:
        return 1
    times = 1
    while len(ids) >= length * (times + 1) and list(ids[len(ids) - length * (times + 1) :][:length]) == phrase:
        times += 1
    return times
