"""OpenAI's own package against the server, or against a proxy before it."""

from __future__ import annotations

from typing import Any

import openai

from benchmarks.clients import checks
from benchmarks.clients.checks import Lines, Target, full_key, holds, refusal, same, target, whole_emoji


class Checks:
    """The checks of a client that speaks OpenAI's protocol.

    Args:
        server: behind whatever the client asks.
        url: that the client asks.
        proxied: a proxy stands between, which has its own keys and its own words for errors.
    """

    def __init__(self, server: Target, url: str, *, proxied: bool = False) -> None:
        self._server, self._proxied = server, proxied
        self._client = openai.OpenAI(base_url=url, api_key=server.key, max_retries=0, timeout=300)

    def run(self, lines: Lines) -> None:
        """Run all."""
        for name, check in (
            ("chat template", self.template), ("stop", self.stop), ("emoji in a stream", self.emoji),
            ("usage", self.usage), ("log-probabilities", self.logprobs), ("n", self.several),
            ("tools, auto", self.tools), ("tools, forced: refused", self.forced), ("wrong key", self.wrong_key),
            ("unknown model", self.unknown_model), ("wrong value", self.wrong_value), ("full key", self.full),
        ):  # fmt: skip
            lines.check(name, check)

    def _ask(self, asked: str = checks.QUESTION, **more: Any) -> Any:
        options = {"model": self._server.model, "max_tokens": 24, "temperature": 0} | more
        return self._client.chat.completions.create(messages=[{"role": "user", "content": asked}], **options)

    def template(self) -> str:
        """The chat's answer is that to the prompt that the tokenizer's template writes."""
        chat = self._ask()
        same(chat.usage.prompt_tokens, self._server.prompt_tokens)
        if not self._proxied:
            raw = self._client.completions.create(
                model=self._server.model, prompt=self._server.rendered, max_tokens=24, temperature=0
            )
            same(chat.choices[0].message.content, raw.choices[0].text)
        return str(chat.choices[0].message.content)

    def stop(self) -> None:
        """The text ends before the stop, whole and streamed."""
        free, bounded = self._ask(checks.LISTED), self._ask(checks.LISTED, stop=[checks.STOP])
        text = free.choices[0].message.content
        holds(checks.STOP in text, f"nothing to stop at in {text!r}")
        same(bounded.choices[0].message.content, text.split(checks.STOP)[0])
        same(bounded.choices[0].finish_reason, "stop")
        chunks = self._ask(checks.LISTED, stop=[checks.STOP], stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        same(said, bounded.choices[0].message.content)

    def emoji(self) -> str:
        """Each emoji is several tokens, and the limit falls within one."""
        whole = self._ask(checks.EMOJI, max_tokens=32).choices[0].message.content
        chunks = self._ask(checks.EMOJI, max_tokens=32, stream=True)
        return whole_emoji([chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices], whole)

    def usage(self) -> None:
        """A stream counts what the whole answer counts."""
        whole = self._ask().usage
        same(whole.total_tokens, whole.prompt_tokens + whole.completion_tokens)
        *_, last = self._ask(stream=True, stream_options={"include_usage": True})
        holds(last.usage, "the stream's last chunk has no usage")
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        same([getattr(last.usage, name) for name in counts], [getattr(whole, name) for name in counts])

    def logprobs(self) -> None:
        """One entry a token, with as many alternatives as asked; the greedy token leads them."""
        answer = self._ask(logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        same(len(content), answer.usage.completion_tokens)
        for entry in content:
            same(len(entry.top_logprobs), 3)
            same(entry.token, entry.top_logprobs[0].token)
            holds(entry.logprob <= 0, f"log-probability {entry.logprob}")

    def several(self) -> None:
        """The answer has as many choices as were asked for, numbered."""
        answer = self._ask(n=3, temperature=1.0, seed=1)
        same([choice.index for choice in answer.choices], [0, 1, 2])

    def tools(self) -> str:
        """A model that serves without a tool parser refuses tools that it may choose; `none` is answered."""
        tool = {"type": "function", "function": checks.WEATHER}
        answer = self._ask(tools=[tool], tool_choice="none")
        holds(answer.choices[0].message.content, "no text")
        error = refusal(openai.BadRequestError, lambda: self._ask(tools=[tool]))
        holds("enable-auto-tool-choice" in str(error), str(error))
        return "none: answered; auto: refused, names --enable-auto-tool-choice"

    def forced(self) -> None:
        """A forced call needs a grammar, which the operator must allow."""
        choice = {"type": "function", "function": {"name": "weather"}}
        tool = {"type": "function", "function": checks.WEATHER}
        error = refusal(openai.BadRequestError, lambda: self._ask(tools=[tool], tool_choice=choice))
        holds("structured-output" in str(error), str(error))

    def wrong_key(self) -> None:
        """401; a proxy's model is configured with the wrong key."""
        other = self._client if self._proxied else self._client.with_options(api_key=checks.WRONG_KEY)
        model = "stranger" if self._proxied else self._server.model
        options: Any = {"model": model, "messages": [{"role": "user", "content": "a"}]}
        refusal(openai.AuthenticationError, lambda: other.chat.completions.create(**options))

    def unknown_model(self) -> None:
        """404; a proxy knows its own models and says 400."""
        kind: Any = openai.BadRequestError if self._proxied else openai.NotFoundError
        refusal(kind, lambda: self._ask(model="another"))

    def wrong_value(self) -> None:
        """400 that names the field."""
        error: Any = refusal(openai.BadRequestError, lambda: self._ask(max_tokens=10**9))
        holds("max_tokens" in str(error), str(error))

    def full(self) -> str:
        """429 that says when to come again; a proxy's model is configured with the full key."""
        busy = self._client if self._proxied else self._client.with_options(api_key=self._server.busy_key)
        model = "busy" if self._proxied else self._server.model
        options: Any = {"model": model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        with full_key(self._server):
            error: Any = refusal(openai.RateLimitError, lambda: busy.chat.completions.create(**options))
        # LiteLLM's proxy passes the server's headers on under names of its own.
        name = "llm_provider-retry-after" if self._proxied else "retry-after"
        after = error.response.headers.get(name)
        holds(after, f"no {name}: {dict(error.response.headers)}")
        return f"{name} {after}"


def main() -> None:
    """Run the checks."""
    server, lines = target(), Lines("openai")
    Checks(server, f"{server.url}/v1").run(lines)
    lines.end()


if __name__ == "__main__":
    main()
