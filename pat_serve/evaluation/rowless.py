"""Refuse tasks with tokens that a model cannot look up, by the tokens' names, before they end its engine."""

from __future__ import annotations

from typing import Any

from pat_serve.errors import DataError
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.tokens.vocabulary_guard import guard


def refuse_rowless(lm: Any, vocabulary: Vocabulary, name: str) -> None:
    """Have one of lm-eval's models raise a DataError for a token without a row, wherever its request comes from.

    Args:
        lm: lm-eval's model, which runs a checkpoint here by transformers or by vLLM.
        vocabulary: of the checkpoint.
        name: of the model, for the message.
    """
    if not vocabulary.rowless:
        return
    subject = f"a task's text, with the tokenizer of {name}"

    def refusal(told: str) -> DataError:
        return DataError(
            subject,
            expected="tokens with a row in the model's embedding",
            found=told,
            fix="Bring the tokenizer that belongs to the model, or leave the task out.",
        )

    engine = getattr(lm.model, "llm_engine", None)
    if engine is not None:
        guard(engine, vocabulary, refusal)
        return

    def check(_: Any, arguments: tuple[Any, ...]) -> None:
        ids = arguments[0]
        if int(ids.max()) >= vocabulary.rows:
            vocabulary.require(ids.unique().tolist(), subject)

    lm.model.get_input_embeddings().register_forward_pre_hook(check)
