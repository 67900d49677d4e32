"""LangChain's ChatOpenAI against the server."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

from benchmarks.clients import checks
from benchmarks.clients.checks import Lines, full_key, holds, refusal, same, target, whole_emoji

SERVER = target()
COMMON: dict[str, Any] = {
    "model": SERVER.model, "base_url": f"{SERVER.url}/v1", "api_key": SERVER.key, "temperature": 0, "max_tokens": 24,
    "max_retries": 0, "timeout": 300,
}  # fmt: skip


def chat(**more: Any) -> ChatOpenAI:
    """A chat model with other settings."""
    return ChatOpenAI(**(COMMON | more))


def template() -> str:
    """The chat's answer is that to the prompt that the tokenizer's template writes."""
    answer = chat().invoke(checks.QUESTION)
    same(answer.usage_metadata["input_tokens"], SERVER.prompt_tokens)
    same(answer.content, OpenAI(**COMMON).invoke(SERVER.rendered))
    return str(answer.content)


def stop() -> None:
    """The text ends before the stop, whole and streamed."""
    text = str(chat().invoke(checks.LISTED).content)
    holds(checks.STOP in text, f"nothing to stop at in {text!r}")
    bounded = chat().invoke(checks.LISTED, stop=[checks.STOP])
    same(bounded.content, text.split(checks.STOP)[0])
    same("".join(str(piece.content) for piece in chat().stream(checks.LISTED, stop=[checks.STOP])), bounded.content)


def emoji() -> str:
    """Each emoji is several tokens, and the limit falls within one."""
    model = chat(max_tokens=32)
    whole = str(model.invoke(checks.EMOJI).content)
    return whole_emoji([str(piece.content) for piece in model.stream(checks.EMOJI)], whole)


def usage() -> None:
    """A stream counts what the whole answer counts."""
    model = chat(stream_usage=True)
    whole: Any = model.invoke(checks.QUESTION).usage_metadata
    told = [piece.usage_metadata for piece in model.stream(checks.QUESTION) if piece.usage_metadata]
    counts = ("input_tokens", "output_tokens", "total_tokens")
    same([told[-1][name] for name in counts], [whole[name] for name in counts])


def logprobs() -> None:
    """One entry a token, with as many alternatives as asked."""
    answer: Any = chat(logprobs=True, top_logprobs=3).invoke(checks.QUESTION)
    content = answer.response_metadata["logprobs"]["content"]
    same(len(content), answer.usage_metadata["output_tokens"])
    same({len(entry["top_logprobs"]) for entry in content}, {3})


def several() -> None:
    """The answer has as many choices as were asked for."""
    made = chat(n=3, temperature=1.0, seed=1).generate([[HumanMessage(checks.QUESTION)]])
    same(len(made.generations[0]), 3)


def batch() -> None:
    """Questions at once have the answers that they have one by one."""
    asked = [checks.QUESTION, checks.LISTED, "Say hello."]
    same([one.content for one in chat().batch(asked)], [chat().invoke(one).content for one in asked])


def tools() -> str:
    """Tools without a parser are refused; `none` is answered."""
    tool = {"type": "function", "function": checks.WEATHER}
    holds(chat().bind_tools([tool], tool_choice="none").invoke(checks.QUESTION).content, "no text")
    error = refusal(openai.BadRequestError, lambda: chat().bind_tools([tool]).invoke(checks.QUESTION))
    holds("enable-auto-tool-choice" in str(error), str(error))
    return "none: answered; auto: refused, names --enable-auto-tool-choice"


def forced() -> None:
    """A forced call needs a grammar, which the operator must allow."""
    tool = {"type": "function", "function": checks.WEATHER}
    bound = chat().bind_tools([tool], tool_choice="weather")
    error = refusal(openai.BadRequestError, lambda: bound.invoke(checks.QUESTION))
    holds("structured-output" in str(error), str(error))


def structured() -> None:
    """So does a schema."""
    # LangChain's type of a schema is narrower than what it takes.
    bound = chat().with_structured_output({"title": "City", **checks.WEATHER["parameters"]}, method="json_schema")  # type: ignore[dict-item]
    error = refusal(openai.BadRequestError, lambda: bound.invoke(checks.QUESTION))
    holds("structured-output" in str(error), str(error))


def wrong_key() -> None:
    """401."""
    refusal(openai.AuthenticationError, lambda: chat(api_key=checks.WRONG_KEY).invoke("a"))


def unknown_model() -> None:
    """404."""
    refusal(openai.NotFoundError, lambda: chat(model="another").invoke("a"))


def wrong_value() -> None:
    """400 that names the field."""
    error = refusal(openai.BadRequestError, lambda: chat(max_tokens=10**9).invoke("a"))
    holds("max_tokens" in str(error) or "max_completion_tokens" in str(error), str(error))


def full() -> str:
    """429 that says when to come again."""
    busy = chat(api_key=SERVER.busy_key, max_tokens=1)
    with full_key(SERVER):
        error: Any = refusal(openai.RateLimitError, lambda: busy.invoke("a"))
    after = error.response.headers.get("retry-after")
    holds(after, f"no Retry-After: {dict(error.response.headers)}")
    return f"Retry-After {after}"


def main() -> None:
    """Run the checks."""
    lines = Lines("langchain")
    for name, check in (
        ("chat template", template), ("stop", stop), ("emoji in a stream", emoji), ("usage", usage),
        ("log-probabilities", logprobs), ("n", several), ("batch", batch), ("tools, auto", tools),
        ("tools, forced: refused", forced), ("JSON schema: refused", structured), ("wrong key", wrong_key),
        ("unknown model", unknown_model), ("wrong value", wrong_value), ("full key", full),
    ):  # fmt: skip
        lines.check(name, check)
    lines.end()


if __name__ == "__main__":
    main()
