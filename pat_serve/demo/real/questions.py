"""The questions of the report: a short conversation, open questions, and questions with one right answer.

No question is among the prompts that the training text was made from (`chat_prompts.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Each list is one conversation. Its turns are asked one after the other, with each model's own answers in between.
CONVERSATIONS: tuple[tuple[str, ...], ...] = (
    ("What is the capital of France?", "What can a visitor see there?"),
    ("Why is the sky blue? Answer in two sentences.",),
    ('Rewrite this more politely: "Give me my money back."',),
    ("Explain photosynthesis in two sentences.",),
    (
        "Summarize in one sentence: The museum had been losing visitors for years. Then the new director opened it in "
        "the evenings, invited local bands, and let children in for free. Within a year the visitors doubled.",
    ),
    ("Write a haiku about the moon.",),
    ("What is 8 plus 5?",),
    ("Write a Python function that returns the square of a number.",),
    ("Give me two tips to stay healthy.",),
)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A question with one right answer.

    Attributes:
        question: as it is asked.
        answer: a pattern. An answer that holds it is right; case does not count.
    """

    question: str
    answer: str

    def right(self, text: str) -> bool:
        """Tell whether the answer is in the text, as words of their own."""
        return re.search(rf"\b(?:{self.answer})\b", text, re.IGNORECASE) is not None


FACTS: tuple[Fact, ...] = tuple(
    Fact(question=question, answer=answer)
    for question, answer in (
        ("What is the capital of Japan?", "Tokyo"),
        ("What is the capital of the United Kingdom?", "London"),
        ("Which continent is France in?", "Europe"),
        ("What language do people speak in France?", "French"),
        ("What is the largest planet of the solar system?", "Jupiter"),
        ("What is the largest ocean on Earth?", "Pacific"),
        ("Which star is at the centre of the solar system?", "Sun"),
        ("Who wrote Romeo and Juliet?", "Shakespeare"),
        ("Who was the first president of the United States?", "Washington"),
        ("What is the chemical formula of water?", "H2O|H₂O"),
        ("What gas do people need to breathe?", "oxygen"),
        ("What do we call frozen water?", "ice"),
        ("How many days are in a week?", "seven|7"),
        ("How many months are in a year?", "twelve|12"),
        ("How many legs does a cat have?", "four|4"),
        ("What is the opposite of 'hot'?", "cold|cool"),
        ("What is the opposite of 'up'?", "down"),
        ("Which season comes after winter?", "spring"),
        ("What is 2 plus 2?", "four|4"),
        ("What is 20 minus 5?", "fifteen|15"),
        ("Which animal gives us milk and says moo?", "cows?"),
        ("What colour do you get when you mix blue and yellow?", "green"),
        ("Which planet do we live on?", "Earth"),
        ("In which country are the pyramids of Giza?", "Egypt"),
    )
)
