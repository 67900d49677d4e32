"""Each data set's own fields as a question with lettered options; prompts in the shape of the paper's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

LETTERS = "ABCDEFGHIJ"
YES_NO = ("Yes", "No")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item of a task.

    Attributes:
        stem: the question without its options.
        options: the answers to choose from, without letters.
        gold: index of the right option.
        answer: text after the options that asks for the answer.
    """

    stem: str
    options: tuple[str, ...]
    gold: int
    answer: str = "Answer:"

    @property
    def prompt(self) -> str:
        """The prompt with lettered options, to be answered by a letter."""
        lines = [self.stem, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=False))]
        return "\n".join([*lines, self.answer])

    @property
    def cloze(self) -> str:
        """The prompt without options, to be continued by one of them."""
        return f"{self.stem}\n{self.answer.rstrip()}"

    def as_row(self) -> dict[str, Any]:
        """The item as a row of the data set that lm-eval's tasks read."""
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()},
            "prompt": self.prompt,
            "cloze": self.cloze,
            "letters": LETTERS[: len(self.options)],
            "letter": LETTERS[self.gold],
        }


Row = Mapping[str, Any]


def _yes_or_no(stem: str, *, yes: bool) -> Question:
    return Question(stem=stem, options=YES_NO, gold=0 if yes else 1)


def arc(row: Row) -> Question | None:
    """ARC: a question with four options; None for the few with another number."""
    labels, texts = list(row["choices"]["label"]), row["choices"]["text"]
    if len(texts) != 4:
        return None
    return Question(stem=f"Question: {row['question']}", options=tuple(texts), gold=labels.index(row["answerKey"]))


def boolq(row: Row) -> Question:
    """BoolQ: a passage and a question; label 1 is yes."""
    return _yes_or_no(f"{row['passage']}\nQuestion: {row['question']}", yes=row["label"] == 1)


def copa(row: Row) -> Question:
    """COPA: cause or effect of a premise."""
    return Question(
        stem=f"{row['premise']}\nQuestion: Which may be the {row['question']}?",
        options=(row["choice1"], row["choice2"]),
        gold=int(row["label"]),
    )


def hellaswag(row: Row) -> Question:
    """HellaSwag: four ways in which a description may go on."""
    return Question(
        stem=f"{row['ctx']}\nQuestion: Which ending makes the most sense?",
        options=tuple(row["endings"]),
        gold=int(row["label"]),
    )


def mmlu(row: Row) -> Question:
    """MMLU: a question from one of 57 subjects."""
    subject = str(row["subject"]).replace("_", " ")
    return Question(
        stem=f"There is a single choice question about {subject}. Answer the question by replying A, B, C or D.\n"
        f"Question: {row['question']}",
        options=tuple(row["choices"]),
        gold=int(row["answer"]),
        # The public prompts have a blank after this question, and after no other task's.
        answer="Answer: ",
    )


def multirc(row: Row) -> Question:
    """MultiRC: each answer to a question is judged alone."""
    return _yes_or_no(
        f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer: {row['answer']}\nIs it true?",
        yes=row["label"] == 1,
    )


def openbookqa(row: Row) -> Question:
    """OpenBookQA: a question with the fact that decides it."""
    labels = list(row["choices"]["label"])
    return Question(
        stem=f"Given the fact: {row['fact1']}\nQuestion: {row['question_stem']}",
        options=tuple(row["choices"]["text"]),
        gold=labels.index(row["answerKey"]),
    )


def piqa(row: Row) -> Question:
    """PIQA: a goal and two ways to reach it."""
    return Question(stem=row["goal"], options=(row["sol1"], row["sol2"]), gold=int(row["label"]))


def rte(row: Row) -> Question:
    """RTE: two sentences; label 0 is entailment."""
    return _yes_or_no(
        f"{row['premise']}\n{row['hypothesis']}\nIs the sentence below entailed by the sentence above?",
        yes=row["label"] == 0,
    )


def siqa(row: Row) -> Question:
    """SIQA: a context and a question with three answers; labels count from 1."""
    return Question(
        stem=f"{row['context']}\nQuestion: {row['question']}",
        options=(row["answerA"], row["answerB"], row["answerC"]),
        gold=int(row["label"]) - 1,
    )


def wic(row: Row) -> Question:
    """WiC: label 1 means that a word has one sense in both. The public prompts misspell the question's last word."""
    return _yes_or_no(
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
        f"Are '{row['word']}' in the above two sentenses the same?",
        yes=row["label"] == 1,
    )


def winogrande(row: Row) -> Question:
    """WinoGrande: two candidates for the blank in a sentence."""
    return Question(
        stem=f"Question: {row['sentence']}", options=(row["option1"], row["option2"]), gold=int(row["answer"]) - 1
    )


def wsc(row: Row) -> Question:
    """WSC: the noun stands between stars and the pronoun between hashes, in the passage and in the question."""
    words = row["text"].split(" ")
    for start, span, mark in (
        (row["span1_index"], row["span1_text"], "*"),
        (row["span2_index"], row["span2_text"], "#"),
    ):
        last = start + len(span.split(" ")) - 1
        words[start] = f"{mark} {words[start]}"
        words[last] = f"{words[last]} {mark}"
    return _yes_or_no(
        f"Passage: {' '.join(words)}\n"
        f"Question: Does the pronoun # {row['span2_text']} # refer to * {row['span1_text']} *?",
        yes=row["label"] == 1,
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """The place of a task's items on the hub, and the way from a row to a question."""

    path: str
    name: str | None
    split: str
    question: Callable[[Row], Question | None]


_GLUE = "aps/super_glue"

SOURCES: dict[str, Source] = {
    "arc_challenge": Source(path="allenai/ai2_arc", name="ARC-Challenge", split="validation", question=arc),
    "arc_easy": Source(path="allenai/ai2_arc", name="ARC-Easy", split="validation", question=arc),
    "boolq": Source(path=_GLUE, name="boolq", split="validation", question=boolq),
    "copa": Source(path=_GLUE, name="copa", split="validation", question=copa),
    "hellaswag": Source(path="Rowan/hellaswag", name=None, split="validation", question=hellaswag),
    "mmlu": Source(path="cais/mmlu", name="all", split="test", question=mmlu),
    "multirc": Source(path=_GLUE, name="multirc", split="validation", question=multirc),
    "openbookqa": Source(path="allenai/openbookqa", name="additional", split="test", question=openbookqa),
    "piqa": Source(path="baber/piqa", name=None, split="validation", question=piqa),
    "rte": Source(path=_GLUE, name="rte", split="validation", question=rte),
    "siqa": Source(path="lighteval/siqa", name=None, split="validation", question=siqa),
    "wic": Source(path=_GLUE, name="wic", split="validation", question=wic),
    "winogrande": Source(path="allenai/winogrande", name="winogrande_xl", split="validation", question=winogrande),
    "wsc": Source(path=_GLUE, name="wsc", split="validation", question=wsc),
}
