"""Measure what pat-serve costs over plain vLLM's server: the same model and load, both up, in turns.

Example: python -m benchmarks.server_overhead --out overhead.json

A tiny model, so that a token takes a few milliseconds and the HTTP side's cost can be seen (--hidden-size and --layers
make one as large as people serve); pat-serve with a key and all its checks, both with their access logs. Short rounds
alternate (A B B A ...), and single requests do, so that what slows the machine slows both. The server whose turn it is
not is stopped (SIGSTOP): vLLM's processes go on spinning for a while after a request, on the cores that the other one
computes on. The bars: 0.98 of vLLM's throughput, 1 ms more at the median of a request's latency, 2 s more until ready.
CPU time of the process that answers, which a busy machine changes little, is told beside them. So are the cores that
each server takes while nothing is asked of it (bar: 2 % of one).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.serving_process import Client, Served, serving
from pat_serve.machine.hardware import describe
from pat_serve.server.analysis.statistics import paired_ratio, percentile
from tests.tiny_models import save_tiny_llama

THROUGHPUT_BAR, LATENCY_BAR_S, READY_BAR_S, IDLE_BAR_CORES = 0.98, 1e-3, 2.0, 0.02
NAMES = ("vllm", "pat-serve")
_CALM_S = 5.0
VLLM_FLAGS = "--dtype float32 --enforce-eager --load-format safetensors --kv-cache-memory-bytes 536870912"


def main() -> None:
    """Measure, print the figures with their verdicts, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; a random one by default")
    parser.add_argument("--hidden-size", type=int, default=64, help="of the random model; 64: tokens of 1 to 2 ms")
    parser.add_argument("--layers", type=int, default=2, help="of the random model")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds of each server's throughput")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="of a throughput round")
    parser.add_argument("--tokens", type=int, default=16, help="of a throughput round's answers")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of single requests for one token")
    parser.add_argument("--starts", type=int, default=2, help="starts of each server")
    parser.add_argument("--idle-s", type=float, default=20.0, help="seconds without a request, of each server")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers}
        sizes |= {"intermediate_size": 2 * options.hidden_size, "max_position_embeddings": 2048}
        # vLLM's CPU kernels want heads of 32.
        sizes |= {"num_attention_heads": options.hidden_size // 16, "num_key_value_heads": options.hidden_size // 32}
        model = options.model or save_tiny_llama(Path(scratch) / "model", **sizes)
        figures = measure(model, Path(scratch), options)
    figures |= {"date": datetime.now(UTC).date().isoformat(), "machine": describe()}
    print(json.dumps({name: value for name, value in figures.items() if name not in ("raw", "machine")}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(model: Path, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all three comparisons: throughput, latency, time until ready."""
    ready: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    tokens: dict[str, list[float]] = {name: [] for name in NAMES}
    latency: dict[str, list[float]] = {name: [] for name in NAMES}
    cpu: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    order = list(turns(options.starts))
    with ExitStack() as kept:
        up: dict[str, Served] = {}
        for index, name in enumerate(order):
            start = serving(name, model, scratch / f"{index}.log", vllm_flags=VLLM_FLAGS.split(), flags=[])
            if name in order[index + 1 :]:
                with start as served:
                    ready[name].append((served.ready_s, tree_cpu_s(served)))
            else:
                up[name] = kept.enter_context(start)
                ready[name].append((up[name].ready_s, tree_cpu_s(up[name])))
            print(f"{name}: ready after {ready[name][-1][0]:.2f} s, {ready[name][-1][1]:.2f} s of CPU", flush=True)
        pids = {name: processes(up[name]) for name in NAMES}
        kept.callback(lambda: [resume(pids[name]) for name in NAMES])
        for name in NAMES:
            throughput(up[name], str(model), options)
        idle = {name: idle_cores(up[name], options.idle_s) for name in alone(NAMES, pids)}
        print("idle:", {name: f"{cores:.1%} of a core" for name, cores in idle.items()}, flush=True)
        spent = {name: http_cpu_s(up[name]) for name in NAMES}
        before = {name: memory(up[name]) for name in NAMES}
        for name in alone(turns(options.rounds), pids):
            tokens[name].append(throughput(up[name], str(model), options))
        print("throughput:", {name: round(percentile(rates, 50), 1) for name, rates in tokens.items()}, flush=True)
        for name in NAMES:
            cpu[name]["stream"] = (http_cpu_s(up[name]) - spent[name]) / (options.rounds * options.requests)
        # The connection is not opened earlier: a server closes a connection on which nothing happens for 5 s.
        clients = {name: Client(up[name].port) for name in NAMES}
        for name in NAMES:
            latencies(clients[name], str(model), 20)
        spent = {name: http_cpu_s(up[name]) for name in NAMES}
        for name in alone(turns(options.pairs), pids):
            latency[name] += latencies(clients[name], str(model), 1)
        for name in NAMES:
            cpu[name]["single"] = (http_cpu_s(up[name]) - spent[name]) / options.pairs
        requests = options.rounds * options.requests + options.pairs
        grown = {
            name: {role: round((after - before[name][role]) / requests) for role, after in memory(up[name]).items()}
            for name in NAMES
        }
    more = {"http_cpu_s_per_request": cpu, "grown_bytes_per_request": grown, "rss_bytes": before}
    more |= {"idle_cores": idle | {"bar": IDLE_BAR_CORES}}
    return summary(ready, tokens, latency) | more


def summary(
    ready: dict[str, list[tuple[float, float]]], tokens: dict[str, list[float]], latency: dict[str, list[float]]
) -> dict[str, Any]:
    """Medians, intervals of what is compared, and which bars are met."""
    plain, ours = NAMES
    # These are durations per token: the ratio of vLLM's to ours is that of our throughput to vLLM's.
    speed = paired_ratio([1 / rate for rate in tokens[plain]], [1 / rate for rate in tokens[ours]])
    added_s = median_interval([b - a for a, b in zip(latency[plain], latency[ours], strict=True)])
    ready_s = {name: percentile([wall_s for wall_s, _ in starts], 50) for name, starts in ready.items()}
    ready_cpu_s = {name: percentile([cpu_s for _, cpu_s in starts], 50) for name, starts in ready.items()}
    return {
        "output_tokens_per_s": {name: round(percentile(rates, 50), 1) for name, rates in tokens.items()},
        "throughput_ratio": {"median": speed.median, "low": speed.low, "high": speed.high, "bar": THROUGHPUT_BAR},
        "latency_p50_s": {name: percentile(times, 50) for name, times in latency.items()},
        "added_latency_s": dict(zip(("median", "low", "high"), added_s, strict=True)) | {"bar": LATENCY_BAR_S},
        "ready_s": ready_s,
        "ready_cpu_s": ready_cpu_s,
        "ready_later_s": {"median": ready_s[ours] - ready_s[plain], "bar": READY_BAR_S},
        "met": {
            "throughput": speed.median >= THROUGHPUT_BAR,
            "latency": added_s[0] < LATENCY_BAR_S,
            "ready": ready_s[ours] - ready_s[plain] <= READY_BAR_S,
        },
        "raw": {"ready_s": ready, "output_tokens_per_s": tokens, "latency_s": latency},
    }


def median_interval(values: Sequence[float], *, resamples: int = 2000) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    sample = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(sample), size=(resamples, len(sample)))
    low, high = np.percentile(np.median(sample[picks], axis=1), [2.5, 97.5])
    return float(np.median(sample)), float(low), float(high)


def http_cpu_s(served: Served) -> float:
    """CPU seconds until now of the process that answers: pat-serve's first process only watches it."""
    process = psutil.Process(served.process.pid)
    times = (process.children()[0] if served.name == "pat-serve" else process).cpu_times()
    return float(times.user + times.system)


def memory(served: Served) -> dict[str, int]:
    """Resident bytes of the process that answers, and of all others."""
    process = psutil.Process(served.process.pid)
    http = process.children()[0] if served.name == "pat-serve" else process
    return {
        "http": http.memory_info().rss,
        "engine": sum(one.memory_info().rss for one in http.children(recursive=True)),
    }


def tree_cpu_s(served: Served) -> float:
    """CPU seconds until now of all the server's processes that live."""
    process = psutil.Process(served.process.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def idle_cores(served: Served, seconds: float) -> float:
    """Cores that a server takes while nothing is asked of it."""
    # vLLM's processes go on spinning for a while after a request.
    time.sleep(_CALM_S)
    before_s, began_s = tree_cpu_s(served), time.monotonic()
    time.sleep(seconds)
    return (tree_cpu_s(served) - before_s) / (time.monotonic() - began_s)


def processes(served: Served) -> list[int]:
    """All of a server's processes."""
    process = psutil.Process(served.process.pid)
    return [process.pid, *(one.pid for one in process.children(recursive=True))]


def resume(pids: Sequence[int]) -> None:
    """Let stopped processes go on; those that ended need nothing."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def alone(order: Iterable[str], pids: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The same names, each with all other servers stopped while it is worked on; afterwards all go on."""
    for name in order:
        resume(pids[name])
        for other in pids.keys() - {name}:
            for pid in pids[other]:
                os.kill(pid, signal.SIGSTOP)
        yield name
    for stopped in pids.values():
        resume(stopped)


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


def latencies(client: Client, model: str, requests: int) -> list[float]:
    """Seconds of each of some requests for one token, one after the other on one connection."""
    body = {"model": model, "prompt": "Return a new", "max_tokens": 1, "temperature": 0}
    times = []
    for _ in range(requests):
        begun_s = time.perf_counter()
        status, content = client.post("/v1/completions", body)
        times.append(time.perf_counter() - begun_s)
        if status != 200:
            raise SystemExit(f"{content[:300]!r}")
    return times


if __name__ == "__main__":
    main()
