"""Do other people's clients get from pat-serve what they ask of it? One line a client and check.

Example: make clients MODEL=folder
         python -m benchmarks.clients --model folder --python .venv-clients/bin/python --only langchain_chat

The server runs in the project's environment, on a chat model. The clients run in one of their own
(requirements/clients.lock). wrk and curl are the system's. The command exits with 1 if a check fails or did not run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.clients.checks import QUESTION, Target
from benchmarks.serving_process import KEY, serving

CLIENTS = ("openai_sdk", "litellm_sdk", "litellm_proxy", "langchain_chat", "curl_sse", "wrk_load")
BUSY_KEY = "busy-benchmark-key"
# wrk has as many connections. All of them are under way at once, and one more is refused.
BOUND = 64
# Greedy texts are compared, so near ties must fall the same way in a whole answer and in a stream.
VLLM_FLAGS = "--dtype float32 --enforce-eager --max-model-len 2048 --max-num-seqs 16 --kv-cache-memory-bytes 402653184"
# LiteLLM would fetch a list of prices, and LangChain could report its calls.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
_LIMIT_S = 900


def main() -> None:
    """Serve, let each client check, and exit with 1 if one found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a chat model")
    parser.add_argument("--python", type=Path, default=Path(".venv-clients/bin/python"), help="the clients' Python")
    parser.add_argument("--only", action="append", choices=CLIENTS, help="this client alone; can be repeated")
    options = parser.parse_args()
    if not options.python.exists():
        raise SystemExit(f"expected the clients' Python, found no {options.python}; `make clients` makes it")
    # Importing it takes seconds.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if not tokenizer.chat_template:
        raise SystemExit(f"{options.model}: expected a chat model, found a tokenizer without a chat template")
    turns = [{"role": "user", "content": QUESTION}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    flags = ["--api-key", f"busy={BUSY_KEY}", "--max-concurrency-per-key", str(BOUND), "--max-queue", "128"]
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with serving("pat-serve", options.model, log, vllm_flags=VLLM_FLAGS.split(), flags=flags) as served:
            target = Target(
                url=f"http://127.0.0.1:{served.port}",
                model=str(options.model),
                key=KEY,
                busy_key=BUSY_KEY,
                bound=BOUND,
                rendered=rendered,
                prompt_tokens=len(tokenizer(rendered, add_special_tokens=False)["input_ids"]),
            )
            for client in options.only or CLIENTS:
                command = [str(options.python), "-m", f"benchmarks.clients.{client}"]
                if subprocess.run(
                    command, env=os.environ | target.environment() | OFFLINE, timeout=_LIMIT_S
                ).returncode:
                    failed.append(client)
        if tracebacks := log.read_text(errors="replace").count("Traceback"):
            failed.append(f"{tracebacks} tracebacks in the server's log")
    print(f"{datetime.now(UTC).date().isoformat()}: " + (f"failed: {', '.join(failed)}" if failed else "all ok"))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
