"""The draft of a served model is looked at before vLLM loads either of the two."""

from __future__ import annotations

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.errors import UsageError
from pat_serve.server.start.trusted_model import check_trusted


def check_draft(model: str, draft: str) -> None:
    """Refuse a draft that is not there, brings code, or speaks of other tokens.

    Raises:
        MissingModel: no such folder, or no such model on the hub.
        UnsupportedModel: the draft brings pickles or code.
        UsageError: the draft's vocabulary is another one.
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
