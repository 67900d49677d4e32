"""Tokens without a row in the embedding: refused on every route that reaches the engine, which lives on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.conftest import Server

TEXT = "a <|im_start|>b<|im_end|>"
CHAT = [{"role": "user", "content": TEXT}]
NAMED = "<|im_start|> (384), <|im_end|> (385) without a row in the model's embedding; ids of this model are 0 to 383"

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": TEXT, "max_tokens": 2}),
    "a list of prompts": ("/v1/completions", {"prompt": ["fine", TEXT], "max_tokens": 2}),
    "completions, streamed": ("/v1/completions", {"prompt": TEXT, "max_tokens": 2, "stream": True}),
    "echo": ("/v1/completions", {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}),
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}),
    "chat, streamed": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "stream": True}),
    "messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 2}),
    "messages, streamed": ("/v1/messages", {"messages": CHAT, "max_tokens": 2, "stream": True}),
    "responses": ("/v1/responses", {"input": TEXT, "max_output_tokens": 2}),
    "responses, streamed": ("/v1/responses", {"input": TEXT, "max_output_tokens": 2, "stream": True}),
}


@pytest.mark.usefixtures("serves_afterwards")
@pytest.mark.parametrize("route", ROUTES)
def test_a_text_with_them_is_refused(route: str, client: httpx.Client, server: Server):
    path, body = ROUTES[route]
    answer = client.post(path, json={"model": str(server.model), **body})
    assert answer.status_code == 400, answer.text
    assert NAMED in answer.text


@pytest.mark.usefixtures("serves_afterwards")
def test_our_own_route_refuses_texts_and_ids(client: httpx.Client):
    for body in ({"prompt": TEXT}, {"messages": CHAT}, {"prompt_token_ids": [1, 384]}):
        answer = client.post("/generate", json=body)
        assert answer.status_code == 400
        assert "token id 384" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": [1, 384]}).status_code == 400


@pytest.mark.usefixtures("serves_afterwards")
def test_stops_without_a_row_are_no_obstacle(client: httpx.Client):
    """The generation config names some; with min_tokens vLLM would look up their logits."""
    for settings in ({"min_tokens": 3}, {"bad_words": ["<|im_end|>", "b"]}, {"min_tokens": 2, "n": 2}):
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, **settings})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= settings.get("min_tokens", 1)
    answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "stop_token_ids": [385]})
    assert answer.status_code == 400


def test_the_start_says_so(server: Server):
    log = server.log.read_text(errors="replace")
    assert "warning: the tokenizer has 2 tokens without a row in the model's embedding of 384 rows" in log
