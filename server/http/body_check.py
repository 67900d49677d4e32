"""Bounds for the JSON bodies of vLLM's own routes, checked before vLLM parses them.

vLLM checks types and no sizes: it leaves `n`, stops and prompts unbounded, and takes numbers as strings. The check goes
by field names, so that it holds for every route that generates, whatever its path. Messages name fields and bounds, and
repeat nothing of the body.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from pat_serve.server.http.errors import InvalidRequestError
from pat_serve.server.http.feature_check import check_features
from pat_serve.server.http.limits import MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOPS
from pat_serve.server.http.policy import MAX_REQUEST_ID_CHARS, Policy

MAX_LOGPROBS = 20
MAX_NAME_CHARS = 256
MAX_TOKEN_RULES = 1024
# Lists and objects are counted: a megabyte of empty ones holds up the event loop, and every stream with it, for most of
# a second.
MAX_CONTAINERS = 50_000

_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")
_STOPS = ("stop", "stop_sequences", "bad_words")
_TOKEN_RULES = ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids")
_NAMES = ("model", "user", "cache_salt", "session_id", "role")
# The pattern matches whatever stands after a quote, even a string without an end, and never goes back. So its time
# grows with the body's length and not with the square of the length.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ModelBounds:
    """The bounds of the served model: its context in tokens, its vocabulary in ids."""

    max_model_len: int
    vocab_size: int


def valid_request_id(text: str) -> bool:
    """Whether a client's request id may go into answers and logs."""
    return _REQUEST_ID.fullmatch(text) is not None


def check_containers(body: bytes) -> None:
    """Refuse JSON of more lists and objects than any request needs, before it is parsed.

    Raises:
        InvalidRequestError: the body has too many of them.
    """
    if _containers(body) > MAX_CONTAINERS and _containers(_STRINGS.sub(b"", body)) > MAX_CONTAINERS:
        raise InvalidRequestError(f"the body holds more than {MAX_CONTAINERS} lists and objects")


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def check_body(body: bytes, policy: Policy, model: ModelBounds) -> int:
    """Refuse a body that asks for too much.

    Args:
        body: JSON.
        policy: bounds and allowed features.
        model: the served model's sizes.

    Returns:
        number of sequences that the engine has to generate for the body.

    Raises:
        InvalidRequestError: the body is no JSON object, or a field is out of bounds or not allowed.
    """
    try:
        # This parser is stricter than Python's: it takes no NaN and no lone surrogates, and bounds nesting and digits.
        fields = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    _check_numbers(fields, policy, model)
    _check_texts(fields)
    prompts = _check_prompts(fields, model) * _check_messages(fields)
    check_features(fields, policy.allowed)
    sequences = prompts * (fields.get("n") or 1)
    if sequences > policy.max_sequences:
        raise InvalidRequestError(
            f"the request asks for {sequences} sequences (prompts times n); {policy.max_sequences} are allowed", "n"
        )
    return int(sequences)


def _check_numbers(fields: Mapping[str, Any], policy: Policy, model: ModelBounds) -> None:
    tokens = (0, model.max_model_len)
    bounds = {
        "n": (1, policy.max_sequences),
        "best_of": (1, policy.max_sequences),
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "max_output_tokens": tokens,
        "min_tokens": tokens,
        "truncate_prompt_tokens": (-1, model.max_model_len),
        "top_logprobs": (0, MAX_LOGPROBS),
        "prompt_logprobs": (0, MAX_LOGPROBS),
        "logprobs": (0, MAX_LOGPROBS),
        "seed": (-(2**63), 2**63 - 1),
        "priority": (-(2**31), 2**31 - 1),
    }
    for name, value in fields.items():
        # 1e999 is valid JSON and infinite; vLLM would take it.
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise InvalidRequestError(f"{name}: must be a finite number", name)
        if value is None or name not in bounds or (name == "logprobs" and isinstance(value, bool)):
            continue
        low, high = bounds[name]
        # A string of digits too would become a number in vLLM, behind this check.
        if type(value) is not int or not low <= value <= high:
            raise InvalidRequestError(f"{name}: must be an integer from {low} to {high}", name)


def _check_texts(fields: Mapping[str, Any]) -> None:
    for name in _STOPS:
        stops = fields.get(name)
        stops = [stops] if isinstance(stops, str) else stops or []
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise InvalidRequestError(f"{name}: must be a string or a list of strings", name)
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            told = f"{name}: at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters are allowed"
            raise InvalidRequestError(told, name)
    for name in _TOKEN_RULES:
        rules = fields.get(name)
        if rules is not None and not (isinstance(rules, list | dict) and len(rules) <= MAX_TOKEN_RULES):
            raise InvalidRequestError(f"{name}: at most {MAX_TOKEN_RULES} entries are allowed", name)
    for name in _NAMES:
        text = fields.get(name)
        if isinstance(text, str) and (len(text) > MAX_NAME_CHARS or not text.isprintable()):
            raise InvalidRequestError(f"{name}: at most {MAX_NAME_CHARS} printable characters are allowed", name)
    request_id = fields.get("request_id")
    if request_id is not None and not (isinstance(request_id, str) and valid_request_id(request_id)):
        told = f"request_id: must be 1 to {MAX_REQUEST_ID_CHARS} letters, digits and ._:-"
        raise InvalidRequestError(told, "request_id")


def _check_prompts(fields: Mapping[str, Any], model: ModelBounds) -> int:
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return 1
    if all(type(item) is int for item in prompt):
        _check_ids(prompt, model)
        return 1
    if all(isinstance(item, str) for item in prompt):
        return len(prompt)
    for item in prompt:
        if not isinstance(item, list) or not item or not all(type(token) is int for token in item):
            raise InvalidRequestError(
                "prompt: must be a text, a list of texts, token ids, or a list of these", "prompt"
            )
        _check_ids(item, model)
    return len(prompt)


def _check_ids(token_ids: list[int], model: ModelBounds) -> None:
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        told = f"prompt: a token id is not in the vocabulary; ids of this model are 0 to {model.vocab_size - 1}"
        raise InvalidRequestError(told, "prompt")


def _check_messages(fields: Mapping[str, Any]) -> int:
    conversations = 0
    for name in ("messages", "input"):
        messages = fields.get(name)
        if not isinstance(messages, list):
            continue
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequestError(f"{name}: at most {MAX_MESSAGES} are allowed", name)
        for message in messages:
            # The batch route takes a list of conversations.
            conversations += isinstance(message, list)
            for turn in message if isinstance(message, list) else [message]:
                if not isinstance(turn, dict):
                    raise InvalidRequestError(f"{name}: must be a list of objects", name)
                content = turn.get("content")
                if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
                    raise InvalidRequestError(f"{name}: the parts of a content must be objects", name)
    return conversations or 1
