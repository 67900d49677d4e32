"""What pat-serve costs over plain vLLM's server: the same model, the same load, both up, in turns.

Example: python -m benchmarks.server_overhead --out overhead.json

A tiny model, so that a token takes a few milliseconds and the HTTP side's cost can be seen; pat-serve with a key and
all its checks, both with their access logs. Rounds alternate (A B B A ...), so that what slows the machine slows both.
The bars: 0.98 of vLLM's throughput, 1 ms more at the median of a request's latency, 2 s more until ready.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.serving_process import Client, Served, serving
from pat_serve.hardware import describe
from pat_serve.server.statistics import paired_ratio, percentile
from tests.tiny_models import save_tiny_llama

THROUGHPUT_BAR, LATENCY_BAR_S, READY_BAR_S = 0.98, 1e-3, 2.0
NAMES = ("vllm", "pat-serve")
VLLM_FLAGS = "--dtype float32 --enforce-eager --load-format safetensors --kv-cache-memory-bytes 67108864"


def main() -> None:
    """Measure, print the figures with their verdicts, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; a tiny random one by default")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds of each server and each load")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="of a throughput round")
    parser.add_argument("--tokens", type=int, default=16, help="of a throughput round's answers")
    parser.add_argument("--latency-requests", type=int, default=40, help="of a latency round, one after the other")
    parser.add_argument("--starts", type=int, default=2, help="starts of each server")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or save_tiny_llama(Path(scratch) / "model", max_position_embeddings=2048)
        figures = measure(model, Path(scratch), options)
    figures |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "python": platform.python_version(),
    }
    print(json.dumps({name: value for name, value in figures.items() if name not in ("raw", "machine")}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(model: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All three comparisons."""
    ready: dict[str, list[float]] = {name: [] for name in NAMES}
    tokens: dict[str, list[float]] = {name: [] for name in NAMES}
    latency: dict[str, list[float]] = {name: [] for name in NAMES}
    order = list(turns(options.starts))
    with ExitStack() as kept:
        up: dict[str, Served] = {}
        for index, name in enumerate(order):
            start = serving(name, model, scratch / f"{index}.log", vllm_flags=VLLM_FLAGS.split(), flags=[])
            if name in order[index + 1 :]:
                with start as served:
                    ready[name].append(served.ready_s)
            else:
                up[name] = kept.enter_context(start)
                ready[name].append(up[name].ready_s)
            print(f"{name}: ready after {ready[name][-1]:.2f} s", flush=True)
        for name in NAMES:
            throughput(up[name], str(model), options)
            latencies(up[name], str(model), options.latency_requests)
        for name in turns(options.rounds):
            tokens[name].append(throughput(up[name], str(model), options))
        for name in turns(options.rounds):
            latency[name].append(percentile(latencies(up[name], str(model), options.latency_requests), 50))
    return summary(ready, tokens, latency)


def summary(ready: dict[str, list[float]], tokens: dict[str, list[float]], latency: dict[str, list[float]]) -> Any:
    """Medians, the interval of the throughput's ratio, and which bars are met."""
    plain, ours = NAMES
    # Durations per token: the ratio of vLLM's to ours is that of our throughput to vLLM's.
    speed = paired_ratio([1 / rate for rate in tokens[plain]], [1 / rate for rate in tokens[ours]])
    added_s = sorted(b - a for a, b in zip(latency[plain], latency[ours], strict=True))
    later_s = percentile(ready[ours], 50) - percentile(ready[plain], 50)
    return {
        "output_tokens_per_s": {name: round(percentile(rates, 50), 1) for name, rates in tokens.items()},
        "throughput_ratio": {"median": speed.median, "low": speed.low, "high": speed.high, "bar": THROUGHPUT_BAR},
        "latency_p50_s": {name: percentile(times, 50) for name, times in latency.items()},
        "added_latency_s": {
            "median": percentile(added_s, 50), "min": added_s[0], "max": added_s[-1], "bar": LATENCY_BAR_S,
        },
        "ready_s": {name: percentile(times, 50) for name, times in ready.items()},
        "ready_later_s": {"median": later_s, "bar": READY_BAR_S},
        "met": {
            "throughput": speed.median >= THROUGHPUT_BAR,
            "latency": percentile(added_s, 50) < LATENCY_BAR_S,
            "ready": later_s <= READY_BAR_S,
        },
        "raw": {"ready_s": ready, "output_tokens_per_s": tokens, "latency_p50_s": latency},
    }  # fmt: skip


def turns(rounds: int) -> Iterator[str]:
    """A B B A A B ...: each server so many times."""
    for index in range(rounds):
        yield from NAMES if index % 2 == 0 else reversed(NAMES)


def throughput(served: Served, model: str, options: argparse.Namespace) -> float:
    """Output tokens per second of streams, so many at once."""
    body = {
        "model": model, "prompt": "Return a new", "max_tokens": options.tokens, "ignore_eos": True, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    left = iter(range(options.requests))
    failures: list[bytes] = []

    def work() -> None:
        client = Client(served.port)
        for _ in left:
            status, content = client.post("/v1/completions", body)
            if status != 200 or not content.rstrip().endswith(b"data: [DONE]"):
                failures.append(content[:300])

    workers = [threading.Thread(target=work) for _ in range(options.concurrency)]
    begun_s = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise SystemExit(f"{served.name}: {failures[0]!r}")
    return float(options.requests * options.tokens / (time.perf_counter() - begun_s))


def latencies(served: Served, model: str, requests: int) -> list[float]:
    """Seconds of each of some requests for one token, one after the other on one connection."""
    client = Client(served.port)
    body = {"model": model, "prompt": "Return a new", "max_tokens": 1, "temperature": 0}
    times = []
    for _ in range(requests):
        begun_s = time.perf_counter()
        status, content = client.post("/v1/completions", body)
        times.append(time.perf_counter() - begun_s)
        if status != 200:
            raise SystemExit(f"{served.name}: {content[:300]!r}")
    return times


if __name__ == "__main__":
    main()
