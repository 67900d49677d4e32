"""Requests that are refused before the engine sees them: fixed bounds of the fields, and checks against the model."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PROMPT_CHARS = 8_000_000
MAX_MESSAGES = 4096
MAX_MODEL_TOKENS = 2_000_000
MAX_STOPS = 16
MAX_STOP_CHARS = 256
# vLLM's and OpenAI's own routes have the same bound.
MAX_TEMPERATURE = 2.0
# Seeds travel to the engine as signed 64-bit integers.
MAX_SEED = 2**63 - 1
DEFAULT_MAX_TOKENS = 256

MAX_BATCH_SIZE = 256
MAX_ROUNDS = 100
MAX_GRID_CELLS = 16
MAX_WARMUP = 10
MAX_REQUESTS = 10_000
MAX_DURATION_S = 600.0
# All prompts of a benchmark together. A token takes 40 bytes in this process; most engines have room for fewer tokens.
MAX_TOKENS_AT_ONCE = 2**22
# A benchmark holds the engine and a connection. A longer benchmark belongs into pat-bench.
BENCHMARK_TIMEOUT_S = 900.0


class LimitError(Exception):
    """A request that this model can never serve; `param` names the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        self.param = param
        super().__init__(message)


def check_vocabulary(prompt_token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Refuse token ids that have no row in the model's embedding.

    Raises:
        LimitError: an id is not in [0, vocab_size).
    """
    for position, token_id in enumerate(prompt_token_ids):
        if not 0 <= token_id < vocab_size:
            raise LimitError(
                f"{param}: token id {token_id} at position {position} is not in the vocabulary; "
                f"ids of this model are 0 to {vocab_size - 1}",
                param,
            )


def output_budget(prompt_tokens: int, max_tokens: int | None, *, max_model_len: int, param: str) -> int:
    """The number of tokens to generate.

    Args:
        prompt_tokens: length of the prompt in tokens.
        max_tokens: the number that was asked for; None takes as many as fit, at most `DEFAULT_MAX_TOKENS`.
        max_model_len: tokens of prompt and output together that the engine serves.
        param: the field that holds the prompt.

    Raises:
        LimitError: the prompt alone, or prompt and output together, are longer than `max_model_len`.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise LimitError(
            f"{param}: the prompt has {prompt_tokens} tokens, and this server takes {max_model_len} for prompt and "
            f"output together; shorten it to {max_model_len - 1} or start pat-serve with a larger --max-model-len",
            param,
        )
    if max_tokens is None:
        return min(room, DEFAULT_MAX_TOKENS)
    if max_tokens > room:
        raise LimitError(
            f"max_tokens: {prompt_tokens} prompt tokens and max_tokens {max_tokens} are {prompt_tokens + max_tokens} "
            f"together, and this server takes {max_model_len}; lower max_tokens to {room} or shorten the prompt",
            "max_tokens",
        )
    return max_tokens


def check_benchmark(prompt_tokens: int, output_tokens: int, *, at_once: int, max_model_len: int) -> None:
    """Refuse a benchmark whose requests do not fit the model, or whose prompts do not fit this process.

    Args:
        prompt_tokens: of each request.
        output_tokens: of each request.
        at_once: requests under way together.
        max_model_len: tokens of prompt and output together that the engine serves.

    Raises:
        LimitError: prompt and output together are longer than `max_model_len`, or all prompts at once than
            `MAX_TOKENS_AT_ONCE`.
    """
    if prompt_tokens + output_tokens > max_model_len:
        raise LimitError(
            f"prompt_tokens: {prompt_tokens} prompt and {output_tokens} output tokens are "
            f"{prompt_tokens + output_tokens} together, and this server takes {max_model_len}; lower either",
            "prompt_tokens",
        )
    if prompt_tokens * at_once > MAX_TOKENS_AT_ONCE:
        raise LimitError(
            f"prompt_tokens: {at_once} prompts of {prompt_tokens} tokens are {prompt_tokens * at_once} at once, and a "
            f"benchmark takes {MAX_TOKENS_AT_ONCE}; lower either",
            "prompt_tokens",
        )
