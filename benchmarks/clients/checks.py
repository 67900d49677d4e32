"""All clients share this: the server that they ask, and one printed line a check. Standard library only.

The clients run in an environment of their own, without pat-serve and without vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

VARIABLE = "PAT_SERVE_CLIENTS_TARGET"
WRONG_KEY = "sk-wrong"
EMOJI = "Continue this pattern: 🚀🌍🚀🌍🚀🌍🚀🌍"
QUESTION = "What is the capital of France?"
STOP = "\n"
LISTED = "Name three colours, each on a line of its own."
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_BUSY_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server under test, and what the project's own tokenizer says of the question.

    Attributes:
        key: unbounded in what the checks do.
        busy_key: another one, which a check fills.
        bound: requests of one key under way.
        rendered: `QUESTION` as the chat template writes it.
        prompt_tokens: of it.
    """

    url: str
    model: str
    key: str
    busy_key: str
    bound: int
    rendered: str
    prompt_tokens: int

    def environment(self) -> dict[str, str]:
        """The variable that hands it to a client's process."""
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def port(self) -> int:
        """Port on 127.0.0.1."""
        return int(self.url.rsplit(":", 1)[1])


def target() -> Target:
    """The server that this process was handed."""
    return Target(**json.loads(os.environ[VARIABLE]))


class Lines:
    """One line a check: client, check, "ok" or what was found."""

    def __init__(self, client: str) -> None:
        self._client, self._failed = client, 0

    def check(self, name: str, run: Callable[[], str | None]) -> None:
        """Run a check; what it returns is told behind "ok", and what it raises is what was found."""
        try:
            more = run()
            found = "ok" + (f" ({more})" if more else "")
        except Exception as error:  # Whatever a client raises is a finding.
            self._failed += 1
            found = " ".join(f"FAILED: {type(error).__name__}: {error}".split())[:600]
        print(f"{self._client} | {name} | {found}", flush=True)

    def end(self) -> None:
        """Exit with 1 if a check has failed."""
        sys.exit(1 if self._failed else 0)


def same(found: object, expected: object) -> None:
    """Raise unless both are equal."""
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


def holds(true: object, what: str) -> None:
    """Raise unless true."""
    if not true:
        raise AssertionError(what)


def whole_emoji(pieces: list[str], whole: str) -> str:
    """Raise unless the pieces of a stream are the whole text, and no piece shows half a character."""
    same("".join(pieces), whole)
    holds("🚀" in whole or "🌍" in whole, f"the model wrote no emoji: {whole!r}")
    holds(not any("\ufffd" in piece for piece in [*pieces, whole]), f"U+FFFD in {pieces!r}")
    return f"{sum(map(bool, pieces))} pieces"


def refusal(kind: type[Exception], run: Callable[[], object]) -> Exception:
    """Return the error of this kind, or raise."""
    try:
        answer = run()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, found an answer: {answer!r:.200}")


@contextmanager
def full_key(server: Target) -> Iterator[None]:
    """Hold as many streams as one key may have under way."""
    body = {"model": server.model, "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    head = {"Authorization": f"Bearer {server.busy_key}", "Content-Type": "application/json"}
    held = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=_BUSY_S) for _ in range(server.bound)]

    def ask(connection: http.client.HTTPConnection) -> None:
        with suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/v1/completions", json.dumps(body), head)

    threads = [threading.Thread(target=ask, args=(connection,)) for connection in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        wait_for(server, server.bound)
        yield
    finally:
        for connection in held:
            connection.close()
        wait_for(server, 0)


def wait_for(server: Target, requests: int) -> None:
    """Wait until so many requests run or wait in the engine."""
    deadline_s, found = time.monotonic() + _BUSY_S, -1.0
    while time.monotonic() < deadline_s:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_BUSY_S)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {server.key}"})
        told = connection.getresponse().read().decode()
        connection.close()
        found = sum(
            map(float, re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", told, re.MULTILINE))
        )
        if found == requests:
            return
        time.sleep(0.1)
    raise AssertionError(f"expected {requests} requests under way, found {found:g} after {_BUSY_S:.0f} s")
