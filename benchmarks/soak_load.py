"""Clients of a soak: they ask well, ask wrongly, and leave at every stage of a request."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from benchmarks.serving_process import KEY, Client

MODEL_LENGTH = 2048
_LONG = 1500
_SENTENCE = "what why name list two tall bridges rivers of the old world and write a poem about 🌉 naïve cafés"


class Load:
    """Threads that work whenever they may.

    Args:
        port: of the server.
        model: name under which it serves.
        workers: number of threads.
        plain: the server is plain vLLM's: all goes to its one route, nobody is a stranger, and what would
            hurt it (a billion sequences) is left out. A short benchmark is the requests that it would send.
        chat: the model has a chat template, so there are conversations too.
        seed: of what they do.
    """

    def __init__(
        self, port: int, model: str, *, workers: int, plain: bool = False, chat: bool = False, seed: int = 0
    ) -> None:
        self._port, self._model, self._plain, self._chat = port, model, plain, chat
        self._routes = ["/v1/completions"] if plain else ["/generate", "/v1/completions"]
        self.done: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._open, self._ended = threading.Event(), threading.Event()
        self._busy, self._change = 0, threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed}/{index}"),), daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def go(self) -> None:
        """Let the clients work again."""
        self._open.set()

    def pause(self) -> None:
        """Let them finish what they do, and return when all have."""
        self._open.clear()
        with self._change:
            self._change.wait_for(lambda: not self._busy, timeout=120)

    def end(self) -> None:
        """End the threads of all clients."""
        self._ended.set()
        self._open.set()
        for thread in self._threads:
            thread.join(120)

    def _work(self, chance: random.Random) -> None:
        kinds: dict[Callable[[random.Random], None], int] = {
            self.whole: 5, self.stream: 5, self.several: 2, self.long_prompt: 2, self.wrong: 3, self.stranger: 1,
            self.looks: 1, self.leave_stream: 4, self.leave_whole: 4, self.leave_at_once: 2, self.half_a_body: 1,
            self.benchmark: 1,
        }  # fmt: skip
        if self._plain:
            del kinds[self.stranger]
        if self._chat:
            kinds |= {self.conversation: 5, self.leave_conversation: 2}
        while self._open.wait() and not self._ended.is_set():
            with self._change:
                self._busy += 1
            [kind] = chance.choices(list(kinds), list(kinds.values()))
            try:
                kind(chance)
            except (OSError, http.client.HTTPException) as error:
                self.unexpected.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            finally:
                with self._change:
                    self.done[kind.__name__] += 1
                    self._busy -= 1
                    self._change.notify_all()

    def _body(self, chance: random.Random, route: str, tokens: int, **more: Any) -> dict[str, Any]:
        # Every prompt is another one, so that the prefix cache fills and is emptied.
        prompt = [chance.randrange(3, 380) for _ in range(chance.randrange(4, 60))]
        body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
        own = {"prompt_token_ids": prompt} if route == "/generate" else {"prompt": prompt, "model": self._model}
        return body | own | more

    def _ask(self, route: str, body: dict[str, Any], *expected: int) -> None:
        client = Client(self._port)
        try:
            status, content = client.post(route, body)
        finally:
            client.connection.close()
        # A full queue is an answer too.
        if status not in (*expected, 503):
            self.unexpected.append(f"{route}: {status} {content[:200]!r}")

    def whole(self, chance: random.Random) -> None:
        """An answer in one piece."""
        route = chance.choice(self._routes)
        self._ask(route, self._body(chance, route, chance.randrange(1, 24)), 200)

    def stream(self, chance: random.Random) -> None:
        """A stream that is read to its end."""
        route = chance.choice(self._routes)
        self._ask(route, self._body(chance, route, chance.randrange(1, 24), stream=True), 200)

    def several(self, chance: random.Random) -> None:
        """Many sequences of one request."""
        self._ask("/v1/completions", self._body(chance, "/v1/completions", 6, n=chance.randrange(2, 6)), 200)

    def long_prompt(self, chance: random.Random) -> None:
        """A prompt that takes a while."""
        body = self._body(chance, self._routes[0], 2)
        body["prompt" if self._plain else "prompt_token_ids"] = [chance.randrange(3, 380)] * _LONG
        self._ask(self._routes[0], body, 200)

    def _turns(self, chance: random.Random, route: str, tokens: int, **more: Any) -> dict[str, Any]:
        asked = " ".join(chance.choice(_SENTENCE.split()) for _ in range(chance.randrange(2, 40)))
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": asked}]
        own = {} if route == "/generate" else {"model": self._model, "logprobs": True, "top_logprobs": 2}
        return {"messages": messages, "max_tokens": tokens, "stop": ["\n\n"]} | own | more

    def conversation(self, chance: random.Random) -> None:
        """Turns that the chat template writes, whole or streamed, with log-probabilities and a stop."""
        route = chance.choice(["/v1/chat/completions", *self._routes[:-1]])
        self._ask(route, self._turns(chance, route, chance.randrange(1, 24), stream=chance.random() < 0.5), 200)

    def leave_conversation(self, chance: random.Random) -> None:
        """A client that leaves its conversation between two events."""
        self._leave(chance, "/v1/chat/completions", self._turns(chance, "/v1/chat/completions", _LONG, stream=True))

    def wrong(self, chance: random.Random) -> None:
        """A request that is refused."""
        self._ask(self._routes[0], self._body(chance, self._routes[0], 10**9), 400)
        more: dict[str, Any] = {"temperature": -1} if self._plain else {"n": 10**9}
        self._ask("/v1/completions", self._body(chance, "/v1/completions", 4, **more), 400)
        self._ask(f"/no/{chance.random()}", {}, 404)

    def stranger(self, chance: random.Random) -> None:
        """A request without a key."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.request("POST", "/generate", json.dumps(self._body(chance, "/generate", 4)))
        if (status := connection.getresponse().status) != 401:
            self.unexpected.append(f"a stranger: {status}")
        connection.close()

    def looks(self, _: random.Random) -> None:
        """A scrape and two probes."""
        client = Client(self._port)
        for path in ("/metrics", "/health") if self._plain else ("/metrics", "/ready", "/health"):
            if (status := client.get(path)[0]) != 200:
                self.unexpected.append(f"{path}: {status}")
        client.connection.close()

    def benchmark(self, chance: random.Random) -> None:
        """A short benchmark; 409 while another runs."""
        if self._plain:
            for _ in range(2):
                self._ask(self._routes[0], self._body(chance, self._routes[0], 4), 200)
            return
        body = {"rounds": 1, "warmup": 0, "batch_size": 2, "prompt_tokens": 8, "output_tokens": 4}
        self._ask("/benchmark/latency", body, 200, 409)

    def leave_stream(self, chance: random.Random) -> None:
        """A client that leaves between two events."""
        route = chance.choice(self._routes)
        self._leave(chance, route, self._body(chance, route, _LONG, stream=True))

    def _leave(self, chance: random.Random, route: str, body: dict[str, Any]) -> None:
        client = Client(self._port)
        answer = client.send(route, body)
        for _ in range(chance.randrange(1, 12)):
            answer.readline()
        answer.close()
        client.connection.close()

    def leave_whole(self, chance: random.Random) -> None:
        """A client that does not wait for its answer."""
        route = chance.choice(self._routes)
        client = Client(self._port)
        client.connection.request("POST", route, json.dumps(self._body(chance, route, _LONG)), client.headers)
        threading.Event().wait(chance.random() * 0.3)
        client.connection.close()

    def leave_at_once(self, chance: random.Random) -> None:
        """A connection that is reset as soon as its request is out."""
        self._send_and_reset(json.dumps(self._body(chance, self._routes[0], _LONG)), 1.0)

    def half_a_body(self, chance: random.Random) -> None:
        """A connection that is reset in the middle of its body."""
        self._send_and_reset(json.dumps(self._body(chance, self._routes[0], 4)), 0.5)

    def _send_and_reset(self, content: str, share: float) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=120) as raw, suppress(OSError):
            head = f"POST {self._routes[0]} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            raw.sendall((head + content[: int(len(content) * share)]).encode())
            # Closing then sends a reset in place of an orderly end.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
