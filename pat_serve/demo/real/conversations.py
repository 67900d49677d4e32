"""Ask the pruned model and its parent the same questions over HTTP, each in its own conversation."""

from __future__ import annotations

from typing import Any

from pat_serve.demo.real.questions import CONVERSATIONS, FACTS
from pat_serve.demo.serving import Server, post

ROUTES = {"parent": "/baseline/generate", "pruned": "/generate"}
_ANSWER_TOKENS, _FACT_TOKENS = 96, 32


def converse(server: Server) -> list[dict[str, Any]]:
    """Hold every conversation with both models, greedily.

    Returns:
        for each conversation `questions`, and by model the `answers` with the request's timings.
    """
    return [
        {
            "questions": list(questions),
            "answers": {name: _conversation(server, route, questions) for name, route in ROUTES.items()},
        }
        for questions in CONVERSATIONS
    ]


def ask_facts(server: Server) -> list[dict[str, Any]]:
    """Ask both models every question with one right answer.

    Returns:
        for each question `question`, `expected`, and by model its `text` and whether that is `right`.
    """
    asked = []
    for fact in FACTS:
        texts = {name: _ask(server, route, [_user(fact.question)], _FACT_TOKENS) for name, route in ROUTES.items()}
        answers = {name: {"text": told["text"], "right": fact.right(told["text"])} for name, told in texts.items()}
        asked.append({"question": fact.question, "expected": fact.answer, "answers": answers})
    return asked


def _conversation(server: Server, route: str, questions: tuple[str, ...]) -> list[dict[str, Any]]:
    messages: list[dict[str, str]] = []
    answers = []
    for question in questions:
        messages.append(_user(question))
        told = _ask(server, route, messages, _ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": told["text"]})
        answers.append({name: told[name] for name in ("text", "finish_reason", "usage", "timings")})
    return answers


def _ask(server: Server, route: str, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
    answer: dict[str, Any] = post(server, route, body)
    return answer


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
