"""A smaller model that proposes tokens for a larger one to check: lossless, and fast where it is often right."""

from __future__ import annotations

from typing import Any

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.errors import UsageError
from pat_serve.server.start.trusted_model import check_trusted


def check_draft(model: str, draft: str) -> None:
    """Refuse a draft that is not there, brings code, or speaks of other tokens, before vLLM loads either.

    Raises:
        MissingModel: no such folder, or no such model on the hub.
        UnsupportedModel: it brings pickles or code.
        UsageError: its vocabulary is another one.
    """
    folder = locate(draft, weights=False)
    check_trusted(draft, folder)
    sizes = [read_config(path).get("vocab_size") for path in (locate(model, weights=False), folder)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"--draft {draft}",
            expected=f"the vocabulary of {sizes[0]} of {model}",
            found=f"a vocab_size of {sizes[1]}",
            fix="Draft with a model that was pruned from it.",
        )


def speculative_config(draft: str, draft_tokens: int) -> dict[str, Any]:
    """What vLLM is told to let a small model propose tokens that the large one checks in one step."""
    return {"method": "draft_model", "model": draft, "num_speculative_tokens": draft_tokens}
