"""A load on a server that keeps its books: how each request ended."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import httpx

from tests.integration.ray_nodes import HANG_S, until


class Load:
    """Clients that ask one request after the other, in three ways, and count how each ended.

    answered: 200 and whole. retryable: 503 with Retry-After, or a stream whose last event is an error. hung: no end
    within `HANG_S`. broken: anything else, which no client could make sense of.
    """

    def __init__(self, url: str, *, clients: int = 6, tokens: int = 100) -> None:
        self.ends: Counter[str] = Counter()
        self.broken: list[str] = []
        self._url = url
        self._tokens = tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(index,), daemon=True) for index in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_S + 30)
        assert not any(thread.is_alive() for thread in self._threads)

    def until_ended(self, more: int) -> None:
        """Wait until that many more requests have ended."""
        goal = self.ends.total() + more
        until(lambda: self.ends.total() >= goal, f"{more} requests that end", HANG_S)

    def figures(self) -> str:
        """One line for a record."""
        kinds = ", ".join(f"{kind} {self.ends[kind]}" for kind in ("answered", "retryable", "hung", "broken"))
        return f"requests {self.ends.total()}: {kinds}"

    def _ask(self, index: int) -> None:
        with httpx.Client(base_url=self._url, timeout=HANG_S) as client:
            number = index
            while not self._stop.is_set():
                number += 1
                try:
                    end = (self._whole, self._stream, self._completions)[number % 3](client)
                except httpx.TimeoutException:
                    end = "hung"
                except (httpx.TransportError, ValueError) as error:
                    end = "broken"
                    self.broken.append(repr(error))
                self.ends[end] += 1

    def _body(self) -> dict[str, Any]:
        return {"max_tokens": self._tokens, "ignore_eos": True}

    def _whole(self, client: httpx.Client) -> str:
        answer = client.post("/generate", json={"prompt_token_ids": [5], **self._body()})
        return self._judge(answer, answer.status_code == 200 and len(answer.json()["token_ids"]) == self._tokens)

    def _completions(self, client: httpx.Client) -> str:
        model = client.get("/v1/models")
        if model.status_code != 200:
            return self._judge(model, False)
        answer = client.post(
            "/v1/completions", json={"model": model.json()["data"][0]["id"], "prompt": [5], **self._body()}
        )
        return self._judge(
            answer, answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == self._tokens
        )

    def _stream(self, client: httpx.Client) -> str:
        with client.stream("POST", "/generate", json={"prompt_token_ids": [5], "stream": True, **self._body()}) as got:
            if got.status_code != 200:
                got.read()
                return self._judge(got, False)
            lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        if any("error" in event for event in events):
            return "retryable"
        count = sum(len(event.get("token_ids", [])) for event in events if "timings" not in event)
        if lines[-1] == "[DONE]" and count == self._tokens:
            return "answered"
        self.broken.append(f"a stream of {count} tokens that ended with {lines[-1:]}")
        return "broken"

    def _judge(self, answer: httpx.Response, good: bool) -> str:
        if good:
            return "answered"
        if answer.status_code == 503 and "retry-after" in answer.headers:
            return "retryable"
        self.broken.append(f"{answer.status_code} {answer.text[:300]}")
        return "broken"
