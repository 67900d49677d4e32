"""LiteLLM's `completion` against the server."""

from __future__ import annotations

from typing import Any

import litellm

from benchmarks.clients import checks
from benchmarks.clients.checks import Lines, full_key, holds, refusal, same, target, whole_emoji

SERVER = target()
litellm.suppress_debug_info = True


def ask(asked: str = checks.QUESTION, **more: Any) -> Any:
    """Ask as its users do; hosted_vllm is LiteLLM's name for a vLLM server."""
    options = {
        "model": f"hosted_vllm/{SERVER.model}", "api_base": f"{SERVER.url}/v1", "api_key": SERVER.key,
        "max_tokens": 24, "temperature": 0, "num_retries": 0, "max_retries": 0, "timeout": 300,
    }  # fmt: skip
    return litellm.completion(messages=[{"role": "user", "content": asked}], **(options | more))


def template() -> str:
    """The chat's answer is that to the prompt that the tokenizer's template writes."""
    chat = ask()
    same(chat.usage.prompt_tokens, SERVER.prompt_tokens)
    raw = litellm.text_completion(
        model=f"hosted_vllm/{SERVER.model}", prompt=SERVER.rendered, api_base=f"{SERVER.url}/v1", api_key=SERVER.key,
        max_tokens=24, temperature=0,
    )  # fmt: skip
    same(chat.choices[0].message.content, raw.choices[0].text)
    return str(raw.choices[0].text)


def stop() -> None:
    """The text ends before the stop, whole and streamed."""
    text = ask(checks.LISTED).choices[0].message.content
    holds(checks.STOP in text, f"nothing to stop at in {text!r}")
    bounded = ask(checks.LISTED, stop=[checks.STOP])
    same(bounded.choices[0].message.content, text.split(checks.STOP)[0])
    same(bounded.choices[0].finish_reason, "stop")
    chunks = ask(checks.LISTED, stop=[checks.STOP], stream=True)
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), bounded.choices[0].message.content)


def emoji() -> str:
    """Each emoji is several tokens, and the limit falls within one."""
    whole = ask(checks.EMOJI, max_tokens=32).choices[0].message.content
    chunks = ask(checks.EMOJI, max_tokens=32, stream=True)
    return whole_emoji([chunk.choices[0].delta.content or "" for chunk in chunks], whole)


def usage() -> None:
    """A stream counts what the whole answer counts."""
    whole = ask().usage
    used = [chunk.usage for chunk in ask(stream=True, stream_options={"include_usage": True}) if "usage" in chunk]
    same((used[-1].prompt_tokens, used[-1].completion_tokens), (whole.prompt_tokens, whole.completion_tokens))


def logprobs() -> None:
    """One entry a token, with as many alternatives as asked."""
    answer = ask(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    same(len(content), answer.usage.completion_tokens)
    same({len(entry.top_logprobs) for entry in content}, {3})


def several() -> None:
    """The answer has as many choices as were asked for."""
    same(len(ask(n=3, temperature=1.0, seed=1).choices), 3)


def tools() -> str:
    """Tools without a parser are refused; `none` is answered."""
    tool = {"type": "function", "function": checks.WEATHER}
    holds(ask(tools=[tool], tool_choice="none").choices[0].message.content, "no text")
    error = refusal(litellm.BadRequestError, lambda: ask(tools=[tool]))
    holds("enable-auto-tool-choice" in str(error), str(error))
    return "none: answered; auto: refused, names --enable-auto-tool-choice"


def forced() -> None:
    """A forced call needs a grammar, which the operator must allow."""
    choice = {"type": "function", "function": {"name": "weather"}}
    tool = {"type": "function", "function": checks.WEATHER}
    error = refusal(litellm.BadRequestError, lambda: ask(tools=[tool], tool_choice=choice))
    holds("structured-output" in str(error), str(error))


def wrong_key() -> None:
    """401."""
    refusal(litellm.AuthenticationError, lambda: ask(api_key=checks.WRONG_KEY))


def unknown_model() -> None:
    """404."""
    refusal(litellm.NotFoundError, lambda: ask(model="hosted_vllm/another"))


def wrong_value() -> None:
    """400 that names the field."""
    error = refusal(litellm.BadRequestError, lambda: ask(max_tokens=10**9))
    holds("max_tokens" in str(error), str(error))


def full() -> str:
    """429 that says when to come again."""
    with full_key(SERVER):
        error: Any = refusal(litellm.RateLimitError, lambda: ask(api_key=SERVER.busy_key, max_tokens=1))
    held = getattr(error, "litellm_response_headers", None) or error.response.headers
    after = held.get("retry-after")
    holds(after, f"no Retry-After: {dict(held)}")
    return f"Retry-After {after}"


def main() -> None:
    """Run the checks."""
    lines = Lines("litellm")
    for name, check in (
        ("chat template", template), ("stop", stop), ("emoji in a stream", emoji), ("usage", usage),
        ("log-probabilities", logprobs), ("n", several), ("tools, auto", tools), ("tools, forced: refused", forced),
        ("wrong key", wrong_key), ("unknown model", unknown_model), ("wrong value", wrong_value), ("full key", full),
    ):  # fmt: skip
        lines.check(name, check)
    lines.end()


if __name__ == "__main__":
    main()
