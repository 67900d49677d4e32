"""Ask a row's checkpoint a question: pat-serve serves it, and a client asks over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.serving_process import Client, serving

QUESTION = "What is the capital of France?"
_VLLM_FLAGS = ["--max-model-len", "512", "--max-num-seqs", "4"]
_FLAGS = ["--kv-cache-gib", "0.25"]
_TOKENS = 32


def answer_of(model: Path, log: Path) -> str:
    """The greedy answer to QUESTION, of at most 32 tokens, from POST /generate of a server of its own."""
    with serving("pat-serve", model, log, vllm_flags=_VLLM_FLAGS, flags=_FLAGS) as served:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"messages": messages, "max_tokens": _TOKENS, "temperature": 0.0}
        status, answer = Client(served.port).post("/generate", body)
    if status != 200:
        raise SystemExit(f"{model}: /generate answered {status}: {answer.decode(errors='replace')}")
    return str(json.loads(answer)["text"])


def listing(answers: dict[str, str]) -> str:
    """The answers by row, one a line."""
    return "\n".join(f"- {name}: {json.dumps(text, ensure_ascii=False)}" for name, text in answers.items())
