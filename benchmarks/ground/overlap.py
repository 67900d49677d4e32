"""Which texts share word sequences: what is measured stays out of what is trained on, and repetitions count once.

A text's 13-grams are those of its words in lower case without punctuation, the unit that GPT-3's authors looked for
test sets with (Brown et al. 2020, appendix C). A text of fewer words is one gram. Grams are compared by 64-bit hashes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

GRAM_WORDS = 13
# A gram of more kept-out texts than this is the wording of a task, not an item. GPT-3's authors drew the line at 10.
MOST_SHARING = 10
# A passage that shares more than this part of its grams with earlier ones repeats them.
REPEATED_SHARE = 0.5
# One gram of so many is remembered to find repetitions: enough for a passage of a hundred words.
_SAMPLED = 8
_WORD = re.compile(r"[^\W_]+")


def grams(text: str) -> list[int]:
    """Hashes of a text's 13-grams, in order; one hash of all words where there are fewer than 13."""
    words = _WORD.findall(text.lower())
    count = max(1, len(words) - GRAM_WORDS + 1)
    return [_hash(" ".join(words[at : at + GRAM_WORDS])) for at in range(count)] if words else []


class KeptOut:
    """Texts that no training row may share a 13-gram with.

    Args:
        texts: each a whole item or paragraph.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update(set(grams(text)))
        self._grams = {gram for gram, sharing in counts.items() if sharing <= MOST_SHARING}

    def touches(self, found: Iterable[int]) -> bool:
        """Tell whether one of a text's grams is kept out."""
        return not self._grams.isdisjoint(found)


class Seen:
    """Passages so far, to find those that repeat them."""

    def __init__(self) -> None:
        self._grams: set[int] = set()

    def repeats(self, found: list[int]) -> bool:
        """Tell whether most of a text's grams were there before; if not, remember them."""
        sampled = {gram for gram in found if gram % _SAMPLED == 0} or set(found[:1])
        if len(sampled & self._grams) > REPEATED_SHARE * len(sampled):
            return True
        self._grams |= sampled
        return False


def _hash(text: str) -> int:
    # Python's own hash differs from process to process, and the grams that are sampled with it.
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
