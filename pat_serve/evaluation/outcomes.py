"""One model's outcomes on every item of one measure. They are cached, and compared pair by pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Outcome(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Likelihoods(_Outcome):
    """Log-likelihoods of text.

    Attributes:
        sums: negative log-likelihood of each row or window, nats.
        counts: scored tokens of each.
        sha256: of the token ids and labels; only equal ones may be compared.
        unit: what a row is: "row" or "window".
        left_out: rows that were too long to be scored.
    """

    kind: Literal["likelihoods"] = "likelihoods"
    sums: list[float]
    counts: list[int]
    sha256: str
    unit: Literal["row", "window"]
    left_out: int = 0


class Answers(_Outcome):
    """Right and wrong answers to the items of one task.

    Attributes:
        items: what names each item, the same for every model.
        right: its score under the task's main metric, 1 or 0 for an accuracy.
        metric: that metric's name.
        normalized: scores under acc_norm (likelihood by characters), where the task has it.
        gold_nll: negative log-likelihood of the right answer, nats, where the task scores likelihoods.
        version: of the task, by its author.
    """

    kind: Literal["answers"] = "answers"
    items: list[str]
    right: list[float]
    metric: str
    normalized: list[float] | None = None
    gold_nll: list[float] | None = None
    version: str | None = None


class Texts(_Outcome):
    """Answers that a model wrote to prompts.

    Attributes:
        ids: token ids of each answer without its end token.
        texts: the same as text.
        ended: whether the model ended each by itself, and not the limit.
        sha256: of the prompts' token ids; only answers to the same ones may be compared.
    """

    kind: Literal["texts"] = "texts"
    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    sha256: str


class Agreement(_Outcome):
    """A model over the answers of the first model, which are given to it token by token.

    Attributes:
        equal: of each answer, the share of tokens that the model's greedy choice equals.
        kl_nats: of each answer, the mean of KL(first model || this model) over its tokens; None where not measured.
        sha256: of the prompts and answers.
    """

    kind: Literal["agreement"] = "agreement"
    equal: list[float]
    kl_nats: list[float] | None
    sha256: str


Outcome = Likelihoods | Answers | Texts | Agreement
OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])


def examples_sha256(examples: Sequence[dict[str, list[int]]]) -> str:
    """SHA-256 of token ids and labels."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["input_ids"], example["labels"]]).encode())
    return digest.hexdigest()
