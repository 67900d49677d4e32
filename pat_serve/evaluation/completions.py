"""lm-eval's model for OpenAI-compatible servers. It sends the ids that the server would make of a prompt's text.

lm-eval's own class adds no special tokens, or with `add_bos_token` all of them to every text, where its class for
transformers follows the tokenizer. The two would measure one model differently. This file imports lm-eval, an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

from lm_eval.models.openai_completions import LocalCompletionsAPI

from pat_serve.tokens.habits import TokenHabit, text_ids, token_habit


class Completions(LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval is not followed by mypy
    """A running server that gets token ids.

    Args:
        settings: lm-eval's.
    """

    def __init__(self, **settings: Any) -> None:
        # lm-eval passes this on for a prompt that is to be continued, and False for a text that is only scored.
        super().__init__(add_bos_token=True, **settings)

    @cached_property
    def habit(self) -> TokenHabit:
        """The ids that the server's tokenizer puts around a text."""
        return token_habit(self.tokenizer)

    @overload
    def tok_encode(self, string: str, **settings: Any) -> list[int]: ...
    @overload
    def tok_encode(self, string: Sequence[str], **settings: Any) -> list[list[int]]: ...
    def tok_encode(self, string: str | Sequence[str], **settings: Any) -> list[int] | list[list[int]]:
        """Ids of a text or of each of several, begun as the tokenizer begins one unless `add_special_tokens` is False.

        Args:
            string: the text or texts.
            settings: lm-eval's; of them `add_special_tokens` counts.
        """
        if not isinstance(string, str):
            return [self.tok_encode(each, **settings) for each in string]
        if settings.get("add_special_tokens") is False:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return text_ids(self.tokenizer, string, self.habit)
