"""Questions whose answers can be checked: sums, differences and products of small numbers, asked in words.

The questions are made on the spot, so every machine asks the same ones and no data set is needed. An answer is right if
the last number in it is the result: the rule of GSM8K's flexible reading.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAME = "arithmetic"
QUESTIONS = 200
_SEED = 20261130
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_KINDS: tuple[tuple[str, Callable[[int, int], int], int], ...] = (
    ("What is {a} plus {b}?", lambda a, b: a + b, 20),
    ("What is {a} minus {b}?", lambda a, b: a - b, 20),
    ("What is {a} times {b}?", lambda a, b: a * b, 12),
    ("{name} has {a} apples and buys {b} more. How many apples does {name} have now?", lambda a, b: a + b, 20),
    ("There are {a} birds in a tree. {b} of them fly away. How many birds are left?", lambda a, b: a - b, 20),
)
_PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with one right number."""

    text: str
    result: int

    def right(self, answer: str) -> bool:
        """Tell whether the last number of an answer is the result."""
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and float(numbers[-1].replace(",", "")) == self.result


def questions(count: int = QUESTIONS) -> list[Question]:
    """The first questions of a fixed list without repetitions; every kind comes in turn."""
    draw = random.Random(_SEED)
    found: dict[str, Question] = {}
    while len(found) < min(count, QUESTIONS):
        template, result, largest = _KINDS[len(found) % len(_KINDS)]
        low, high = sorted(draw.sample(range(2, largest + 1), 2))
        text = template.format(a=high, b=low, name=draw.choice(_PEOPLE))
        found.setdefault(text, Question(text=text, result=result(high, low)))
    return list(found.values())
