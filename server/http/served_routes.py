"""The list of vLLM's routes that are served. A route that is new, or only sometimes there, is not served.

vLLM's other routes steer the engine (sleep, weights, adapters, profiles, other people's requests, all of
VLLM_SERVER_DEV_MODE), hand work between engines, or take bodies whose sequences the front cannot count.
"""

from __future__ import annotations

from collections.abc import Collection

from fastapi import FastAPI

VLLMS = frozenset(
    {
        "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch",
        "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
        "/v1/messages", "/v1/messages/count_tokens",
        "/tokenize", "/detokenize", "/tokenizer_info", "/version", "/load", "/metrics", "/health", "/ping",
        "/invocations", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/static",
    }
)  # fmt: skip
# The engine does not hear of these, so a full queue of its own is no reason to refuse them.
TOKENIZING = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})


def keep_served(app: FastAPI, ours: Collection[str] = ()) -> None:
    """Take away every route that is neither on the list nor ours; its path then does not exist."""
    served = VLLMS.union(ours)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in served]
