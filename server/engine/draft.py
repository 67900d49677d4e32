"""A draft is a smaller model that proposes tokens for a larger one to check.

The result is the larger model's own, and comes faster where the draft is often right.
"""

from __future__ import annotations

from typing import Any


def speculative_config(draft: str, draft_tokens: int) -> dict[str, Any]:
    """vLLM's settings for a draft.

    Args:
        draft: folder or hub id of the smaller model.
        draft_tokens: tokens that it proposes, which the larger model checks in one step.
    """
    return {"method": "draft_model", "model": draft, "num_speculative_tokens": draft_tokens}
