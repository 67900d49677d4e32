"""Varied prompts for a chat model, made of templates and topics. The model is tuned on its answers to them.

`questions.py` has the questions that the report shows; none of them is here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

# A template gets as many of its topics as the requested number allows.
_TOPICS: dict[str, tuple[str, ...]] = {
    "country": (
        "Germany", "Italy", "Spain", "Portugal", "Greece", "Norway", "Sweden", "Finland", "Denmark", "Poland",
        "Austria", "Hungary", "Ireland", "Russia", "Turkey", "Kenya", "Nigeria", "South Africa", "Morocco",
        "India", "China", "South Korea", "Thailand", "Vietnam", "Indonesia", "Australia", "New Zealand", "Canada",
        "Mexico", "Brazil", "Argentina", "Chile", "Peru", "Colombia", "Cuba", "the Netherlands", "Belgium", "Iran",
    ),
    "thing": (
        "a rainbow", "a volcano", "an earthquake", "a black hole", "a comet", "a glacier", "a coral reef", "a desert",
        "a telescope", "a microscope", "a battery", "a magnet", "a bicycle", "a steam engine", "a computer",
        "a compiler", "a database", "a neural network", "the internet", "a virus", "a vaccine", "a cell", "a gene",
        "an atom", "a molecule", "gravity", "electricity", "sound", "inflation", "a bank", "a contract", "a democracy",
        "a sonnet", "a symphony", "a metaphor", "a prime number", "a fraction", "a triangle", "a percentage",
        "the water cycle", "the heart", "the brain", "the immune system", "sleep", "a habit", "a budget", "a compass",
    ),
    "animal": (
        "dog", "horse", "elephant", "whale", "eagle", "bee", "spider", "frog", "snake", "penguin", "tiger", "rabbit",
        "owl", "dolphin", "ant", "bear", "wolf", "turtle",
    ),
    "scene": (
        "spring rain", "an old bridge", "the harbour at night", "a quiet library", "falling leaves", "a mountain path",
        "the first snow", "a train station", "a summer storm", "a garden", "the sea", "a candle", "morning coffee",
        "a sleeping cat",
    ),
    "task": (
        "learn a new language", "sleep better", "save money", "make friends in a new town", "cook rice",
        "prepare for an exam", "write a good email", "keep a plant alive", "start running", "read more books",
        "make a cup of tea", "give a short talk", "plan a trip", "clean a kitchen", "remember names",
        "stay focused at work", "apologize to a friend", "choose a gift", "learn to draw", "save water at home",
    ),
    "blunt": (
        "Send me the file now.", "You are late again.", "I do not like your plan.", "Fix this today.",
        "Your text is too long.", "Stop calling me.", "This price is too high.", "I need the report.",
        "Move your car.", "You forgot the meeting.", "That is wrong.", "Come here at once.",
    ),
    "wordy": (
        "Due to the fact that it was raining, we made the decision to stay inside the house.",
        "The reason why I am writing to you is because I would like to ask for a refund.",
        "In my own personal opinion, I think that the new timetable is not a good one.",
        "At this point in time we are not able to give an answer to the question that you asked.",
        "She is a person who has the ability to speak in front of a large number of people.",
        "The meeting that was planned for Monday has been moved to a later date, which is Friday.",
    ),
    "passage": (
        "Bees carry pollen from flower to flower. Without them many plants could not make seeds, and many crops "
        "would fail. In some places farmers rent hives for their orchards.",
        "The printing press made books cheap. Ideas spread faster, more people learned to read, and within a century "
        "there were presses in every large city of Europe.",
        "The town closed its main street to cars last year. Shops feared for their trade, but more people came on "
        "foot, and the air became cleaner.",
        "Glass is made from sand that is melted at a very high temperature. While it is hot it can be blown, poured or "
        "pressed into almost any shape.",
        "The old lighthouse no longer guides ships. Volunteers painted it, opened a small museum inside, and now "
        "thousands of visitors climb its stairs each summer.",
    ),
    "word": (
        "brave", "quick", "honest", "ancient", "tiny", "bright", "calm", "difficult", "generous", "lonely", "useful",
        "strange", "famous", "gentle", "noisy",
    ),
    "colour_thing": ("grass", "snow", "a ripe banana", "coal", "a lemon", "blood", "a carrot"),
    "person": (
        "Isaac Newton", "Marie Curie", "Albert Einstein", "Charles Darwin", "Ada Lovelace", "Leonardo da Vinci",
        "Mozart", "Cleopatra", "Galileo", "Florence Nightingale", "Nelson Mandela", "Jane Austen",
    ),
    "list": (
        "fruits", "vegetables", "musical instruments", "planets", "oceans", "sports", "kinds of weather",
        "programming languages", "kitchen tools", "breeds of dog", "colours", "board games", "flowers", "trees",
        "means of transport", "jobs in a hospital", "reasons to read", "things to take on a hike",
    ),
    "code": (
        "adds two numbers", "reverses a string", "counts the vowels of a word", "returns the largest item of a list",
        "checks whether a number is even", "reads a text file", "sorts a list of names", "sums a list of numbers",
    ),
}  # fmt: skip
_TEMPLATES = (
    "What is the capital of {country}?",
    "Which continent is {country} in?",
    "What language do people speak in {country}?",
    "Tell me one interesting fact about {country}.",
    "What is {thing}?",
    "Explain {thing} to a child in two sentences.",
    "Why is {thing} important?",
    "What does a {animal} eat?",
    "Tell me a fact about the {animal}.",
    "Write one sentence about a {animal}.",
    "Write a haiku about {scene}.",
    "Describe {scene} in two sentences.",
    "Give me three tips to {task}.",
    "How do I {task}?",
    "Rewrite this more politely: {blunt}",
    "Make this sentence shorter: {wordy}",
    "Summarize in one sentence: {passage}",
    "What is the main idea of this text? {passage}",
    "Give me a synonym of the word '{word}'.",
    "Use the word '{word}' in a sentence.",
    "What is the opposite of '{word}'?",
    "What colour is {colour_thing}?",
    "Who was {person}?",
    "Name three {list}.",
    "Write a Python function that {code}.",
    "What is {a} plus {b}?",
    "What is {a} minus {b}?",
    "What is {a} times {b}?",
)
# The sums that the report asks for are left out.
_NUMBERS = [(a, b) for a in range(2, 13) for b in range(1, a) if a + b > 5 and (a, b) != (8, 5)]
_GREETINGS = (
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Thank you!", "Good morning.", "Goodbye.",
    "Can you help me?", "Tell me a joke.", "Tell me a short story.", "What should I cook today?",
)  # fmt: skip


def chat_prompts(seed: int = 0) -> list[str]:
    """List all prompts in an order in which any beginning has many kinds; the order is the same on every machine."""
    chosen = random.Random(seed)
    kinds = [list(_GREETINGS), *(list(_filled(template)) for template in _TEMPLATES)]
    for kind in kinds:
        chosen.shuffle(kind)
    longest = max(map(len, kinds))
    return [kind[turn] for turn in range(longest) for kind in kinds if turn < len(kind)]


def _filled(template: str) -> Iterator[str]:
    if "{a}" in template:
        yield from (template.format(a=a, b=b) for a, b in _NUMBERS)
        return
    [topic] = [name for name in _TOPICS if f"{{{name}}}" in template]
    yield from (template.format(**{topic: value}) for value in _TOPICS[topic])
