"""Marks of a chat template on the model's own words: `{% generation %}`, which TRL's assistant_only_loss reads."""

from __future__ import annotations

import re
from typing import Any

from pat_serve.errors import DataError
from pat_serve.training.data.row import Tokenizer

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def learned_spans(
    tokenizer: Tokenizer, template: str, messages: list[dict[str, Any]], arguments: dict[str, Any], where: str
) -> list[tuple[int, int]]:
    """Where the marked parts of a chat stand in its rendering, but for answers of weight 0.

    Args:
        tokenizer: for the special tokens that a template may write.
        template: its source.
        messages: the whole chat, which the template takes.
        arguments: what stands beside the messages.
        where: the row's place.

    Returns:
        first character and one past the last of each; none of a template without marks.

    Raises:
        DataError: an answer has weight 0, and the marks do not tell which one is its.
    """
    if not _MARK.search(template):
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, "tools": None, "documents": None, **arguments},
    )
    marked = [(start, stop) for start, stop in spans[0] if start < stop]
    weights = [message.get("weight") for message in messages if message["role"] == "assistant"]
    if 0 not in weights:
        return marked
    if len(marked) != len(weights):
        raise DataError(
            where,
            expected="as many answers marked by the chat template as the row has, to leave out those of weight 0",
            found=f"{len(marked)} marks and {len(weights)} answers",
            fix="Leave the row out, or its weights.",
        )
    return [span for span, weight in zip(marked, weights, strict=True) if weight != 0]
