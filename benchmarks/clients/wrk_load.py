"""wrk at 64 connections: every answer is 200, no socket fails, and the server is idle afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.clients.checks import QUESTION, Lines, full_key, holds, target, wait_for

SERVER = target()
CONNECTIONS, SECONDS = 64, 15


def wrk(key: str, *, stream: bool) -> dict[str, int]:
    """Load the server; counts of answers, of those that are no 2xx, and of sockets that failed."""
    if not shutil.which("wrk"):
        raise AssertionError("wrk is not installed, so this did not run")
    # Whoever left before has given all places back.
    if key == SERVER.key:
        wait_for(SERVER, 0)
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": SERVER.model, "messages": messages, "max_tokens": 2, "stream": stream}
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "post.lua"
        script.write_text(
            'wrk.method = "POST"\n'
            f"wrk.body = [==[{json.dumps(body)}]==]\n"
            'wrk.headers["Content-Type"] = "application/json"\n'
            f'wrk.headers["Authorization"] = "Bearer {key}"\n',
            encoding="utf-8",
        )
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--timeout", "60s", "-s", str(script)]
        done = subprocess.run(
            [*command, f"{SERVER.url}/v1/chat/completions"], capture_output=True, text=True, timeout=120, check=True
        )
    answers = re.search(r"(\d+) requests in", done.stdout)
    holds(answers, done.stdout)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    failed = re.search(r"Socket errors: (.*)", done.stdout)
    return {
        "answers": int(answers[1]) if answers else 0,
        "refused": int(refused[1]) if refused else 0,
        "failed": sum(map(int, re.findall(r"\d+", failed[1]))) if failed else 0,
    }


def load(*, stream: bool) -> str:
    """Open as many connections as the key may have requests under way."""
    counts = wrk(SERVER.key, stream=stream)
    holds(counts["answers"] and not counts["refused"] and not counts["failed"], str(counts))
    return f"{counts['answers']} answers in {SECONDS} s"


def refused() -> str:
    """Beside a full key every answer is a refusal, and no socket fails."""
    with full_key(SERVER):
        counts = wrk(SERVER.busy_key, stream=False)
    holds(counts["answers"] and counts["refused"] == counts["answers"] and not counts["failed"], str(counts))
    return f"{counts['refused']} refusals in {SECONDS} s"


def main() -> None:
    """Run the checks."""
    lines = Lines("wrk")
    lines.check(f"{CONNECTIONS} connections", lambda: load(stream=False))
    lines.check(f"{CONNECTIONS} streams", lambda: load(stream=True))
    lines.check("full key", refused)
    lines.end()


if __name__ == "__main__":
    main()
