"""Command-line curl against the server: the bytes of server-sent events, and of errors."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from benchmarks.clients import checks
from benchmarks.clients.checks import Lines, full_key, holds, same, target, whole_emoji

SERVER = target()
_LIMIT_S = 300


def curl(body: dict[str, Any], *, key: str = SERVER.key, path: str = "/v1/chat/completions") -> tuple[int, str, bytes]:
    """Post with `curl -N`; the status, the headers in lower case, the body as it came."""
    command = ["curl", "-sS", "-N", "-i", "--http1.1", "-H", "Content-Type: application/json", "--data-binary", "@-"]
    command += ["-H", f"Authorization: Bearer {key}", "-H", "Expect:", f"{SERVER.url}{path}"]
    done = subprocess.run(command, input=json.dumps(body).encode(), capture_output=True, timeout=_LIMIT_S, check=True)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), content


def body(asked: str = checks.QUESTION, **more: Any) -> dict[str, Any]:
    """A chat's request."""
    messages = [{"role": "user", "content": asked}]
    return {"model": SERVER.model, "messages": messages, "max_tokens": 24, "temperature": 0} | more


def whole(**more: Any) -> Any:
    """An answer in one piece."""
    status, _, content = curl(body(**more))
    same(status, 200)
    return json.loads(content)


def events(path: str = "/v1/chat/completions", **more: Any) -> list[Any]:
    """A stream's events, each of which is UTF-8 and JSON by itself, before [DONE]."""
    status, head, content = curl(more if path == "/generate" else body(**more, stream=True), path=path)
    same(status, 200)
    holds("content-type: text/event-stream" in head, head)
    holds(content.endswith(b"\n\n"), f"ends with {content[-40:]!r}")
    told = [event.removeprefix(b"data: ") for event in content.strip().split(b"\n\n")]
    same(told.pop(), b"[DONE]")
    return [json.loads(event.decode()) for event in told]


def template() -> str:
    """`/v1` and `/generate` write the same chat, of as many tokens as the tokenizer's template."""
    chat = whole()
    same(chat["usage"]["prompt_tokens"], SERVER.prompt_tokens)
    ours = {"messages": body()["messages"], "max_tokens": 24, "temperature": 0}
    status, _, content = curl(ours, path="/generate")
    same(status, 200)
    same(json.loads(content)["text"], chat["choices"][0]["message"]["content"])
    return str(json.loads(content)["text"])


def stop() -> None:
    """The text ends before the stop, whole and streamed."""
    text = whole(asked=checks.LISTED)["choices"][0]["message"]["content"]
    holds(checks.STOP in text, f"nothing to stop at in {text!r}")
    expected = text.split(checks.STOP)[0]
    same(whole(asked=checks.LISTED, stop=[checks.STOP])["choices"][0]["message"]["content"], expected)
    told = events(asked=checks.LISTED, stop=[checks.STOP])
    same("".join(event["choices"][0]["delta"].get("content") or "" for event in told), expected)


def emoji() -> str:
    """Each emoji is several tokens, and the limit falls within one."""
    text = whole(asked=checks.EMOJI, max_tokens=32)["choices"][0]["message"]["content"]
    told = events(asked=checks.EMOJI, max_tokens=32)
    return whole_emoji([event["choices"][0]["delta"].get("content") or "" for event in told], text)


def generate() -> str:
    """The same from /generate's own stream."""
    own = {"messages": body(checks.EMOJI)["messages"], "max_tokens": 32, "temperature": 0}
    status, _, content = curl(own, path="/generate")
    same(status, 200)
    told = events("/generate", **own, stream=True)
    return whole_emoji([event.get("text") or "" for event in told], json.loads(content)["text"])


def usage() -> None:
    """A stream counts what the whole answer counts."""
    told = events(stream_options={"include_usage": True})
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    expected = whole()["usage"]
    same([told[-1]["usage"][name] for name in counts], [expected[name] for name in counts])


def status_of(expected: int, sent: dict[str, Any], names: str, **more: str) -> None:
    """An error is JSON with a message, under a status and an id of the request."""
    status, head, content = curl(sent, **more)
    same(status, expected)
    holds("x-request-id: " in head, head)
    message = json.loads(content)["error"]["message"]
    holds(names in message, message)


def full() -> str:
    """429 that says when to come again."""
    with full_key(SERVER):
        status, head, _ = curl(body(max_tokens=1), key=SERVER.busy_key)
    same(status, 429)
    found = [line for line in head.splitlines() if line.startswith("retry-after: ")]
    holds(found, head)
    return found[0]


def main() -> None:
    """Run the checks."""
    lines = Lines("curl -N")
    for name, check in (
        ("chat template", template), ("stop", stop), ("emoji in a stream", emoji),
        ("emoji in /generate's stream", generate), ("usage", usage),
    ):  # fmt: skip
        lines.check(name, check)
    lines.check("wrong key", lambda: status_of(401, body(), "key", key=checks.WRONG_KEY))
    lines.check("unknown model", lambda: status_of(404, body(model="another"), "another"))
    lines.check("wrong value", lambda: status_of(400, body(max_tokens=10**9), "max_tokens"))
    lines.check("full key", full)
    lines.end()


if __name__ == "__main__":
    main()
