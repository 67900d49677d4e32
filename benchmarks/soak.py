"""Does a server that is used for long keep what it should give back? Memory, descriptors, processes, cache blocks.

Example: python -m benchmarks.soak --minutes 30 --out soak.md
         python -m benchmarks.soak --model FOLDER --dtype bfloat16 --kv-cache-mib 256 --out soak.md
         python -m benchmarks.soak --minutes 30 --plain --out plain.md
         python -m benchmarks.soak --minutes 30 --plain-samples plain.json --out soak.md

Mixed load with clients that leave at every stage. Every few seconds it pauses; when all clients are done, the engine
must be idle within 2 s and hold no cache block, and then the processes are measured. Memory is judged by its slope over
what the clients did, with an interval, once the first quarter (caches fill, allocators grow) is left out.

--plain puts the same load, as far as it understands it, on plain vLLM. With its samples a run of ours judges the
engine's processes, which run none of our code, by how much more they grow than there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from scipy.stats import theilslopes

from benchmarks.serving_process import Client, serving
from benchmarks.soak_load import MODEL_LENGTH, Load
from pat_serve.machine.hardware import describe
from tests.tiny_models import save_tiny_llama

# Anything that is kept for each request is at least an object or two.
LEAK_BYTES = 1024
IDLE_S = 2.0
WARMUP_SHARE = 0.25
MIB = 2**20
VLLM_FLAGS = ["--max-num-seqs", "8", "--max-model-len", str(MODEL_LENGTH), "--enforce-eager"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at rest.

    Attributes:
        at_s: since the load began.
        requests: done until then, of any kind.
        http_bytes: resident memory of the process that answers.
        engine_bytes: of the engine's processes together.
        descriptors: of all its processes together.
        idle_s: what the engine took to be idle after the last client was done.
        blocks: share of the KV cache that is held by requests.
    """

    at_s: float
    requests: int
    http_bytes: int
    engine_bytes: int
    descriptors: int
    processes: int
    threads: int
    idle_s: float
    blocks: float


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Growth per request (Theil-Sen: the median slope of all pairs), with its 95 % interval."""

    median: float
    low: float
    high: float

    def verdict(self, bar: float) -> str:
        """A leak, none, or not decided by these samples."""
        return "leak" if self.low > bar else "no leak" if self.high < bar else "inconclusive"


def slope(requests: Sequence[float], values: Sequence[float]) -> Slope:
    """Growth of a value per request."""
    fit = theilslopes(values, requests, alpha=0.95)
    return Slope(median=float(fit.slope), low=float(fit.low_slope), high=float(fit.high_slope))


def settled(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples after the warm-up."""
    return samples[int(len(samples) * WARMUP_SHARE) :]


def engine_growth(samples: Sequence[Sample]) -> Slope:
    """Bytes an action of the engine's processes, after the warm-up."""
    kept = settled(samples)
    return slope([sample.requests for sample in kept], [sample.engine_bytes for sample in kept])


def engine_excess(samples: Sequence[Sample], plain: Sequence[Sample]) -> Slope:
    """Bytes an action that the engine grows more than in plain vLLM.

    Growth falls as caches fill, so both count the actions that both have done. The interval is that of two independent
    ends at worst.
    """
    common = min(samples[-1].requests, plain[-1].requests)
    ours, theirs = (engine_growth([one for one in run if one.requests <= common]) for run in (samples, plain))
    return Slope(median=ours.median - theirs.median, low=ours.low - theirs.high, high=ours.high - theirs.low)


def verdicts(samples: Sequence[Sample], plain: Sequence[Sample] | None = None) -> dict[str, str]:
    """Judge each figure: leak or no leak."""
    kept = settled(samples)
    requests = [sample.requests for sample in kept]

    def bounded(values: Sequence[float]) -> str:
        """Pools breathe by a thread or two: a leak is growth by at least one over the whole run, at 95 %."""
        return slope(requests, values).verdict(1 / (requests[-1] - requests[0]))

    return {
        "memory of the HTTP process": slope(requests, [sample.http_bytes for sample in kept]).verdict(LEAK_BYTES),
        **(
            {"memory of the engine": engine_growth(samples).verdict(LEAK_BYTES)}
            if plain is None
            else {"memory of the engine, beyond plain vLLM's": engine_excess(samples, plain).verdict(LEAK_BYTES)}
        ),
        "descriptors": bounded([sample.descriptors for sample in kept]),
        "processes": bounded([sample.processes for sample in kept]),
        "threads": bounded([sample.threads for sample in kept]),
        "cache blocks": "no leak" if all(sample.blocks == 0 for sample in samples) else "leak",
        "idle in time": "yes" if all(sample.idle_s <= IDLE_S for sample in samples) else "no",
    }


def table(samples: Sequence[Sample]) -> str:
    """About a dozen of the samples, in Markdown."""
    step = max(1, len(samples) // 12)
    shown = [*samples[::step]]
    if shown[-1] is not samples[-1]:
        shown.append(samples[-1])
    lines = [
        "| minute | actions | HTTP, MiB | engine, MiB | descriptors | processes | threads | idle after, s | blocks |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in shown:
        cells = [f"{one.at_s / 60:.1f}", one.requests, f"{one.http_bytes / MIB:.1f}", f"{one.engine_bytes / MIB:.1f}"]
        cells += [one.descriptors, one.processes, one.threads, f"{one.idle_s:.2f}", f"{one.blocks:g}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure(server: psutil.Process, port: int, begun_s: float, requests: int, *, plain: bool) -> Sample:
    """Wait until the engine is idle, and look."""
    client, paused_s = Client(port), time.monotonic()
    while True:
        text = client.get("/metrics")[1].decode()
        running, waiting, blocks = (
            _metric(text, f"vllm:{name}")
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )
        idle_s = time.monotonic() - paused_s
        if (running == waiting == blocks == 0) or idle_s > 5 * IDLE_S:
            break
        time.sleep(0.02)
    client.connection.close()
    # Ours only watches a second one, which answers, as plain vLLM's first does itself; all others are the engine's.
    [http] = [server] if plain else server.children()
    engine = http.children(recursive=True)
    processes = [server, *server.children(recursive=True)]
    return Sample(
        at_s=time.monotonic() - begun_s,
        requests=requests,
        http_bytes=http.memory_info().rss,
        engine_bytes=sum(process.memory_info().rss for process in engine),
        descriptors=sum(process.num_fds() for process in processes),
        processes=len(processes),
        threads=sum(process.num_threads() for process in processes),
        idle_s=idle_s,
        blocks=blocks,
    )


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def has_chat_template(model: Path) -> bool:
    """Whether the folder's tokenizer can write a conversation."""
    settings = model / "tokenizer_config.json"
    inside = settings.exists() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return inside or (model / "chat_template.jinja").exists()


def main() -> None:
    """Run, print and write the table with its verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; a tiny random one by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kv-cache-mib", type=int, default=32, help=f"at least {MODEL_LENGTH} tokens of the model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds of load between two samples")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the table as Markdown, and beside it the samples as JSON")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--plain", action="store_true", help="put the load on plain vLLM")
    either.add_argument("--plain-samples", type=Path, help="samples of a run with --plain, to compare the engine with")
    options = parser.parse_args()
    reference = None
    if options.plain_samples:
        reference = [Sample(**row) for row in json.loads(options.plain_samples.read_text(encoding="utf-8"))]
    name = "vllm" if options.plain else "pat-serve"
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or save_tiny_llama(Path(scratch) / "model", max_position_embeddings=MODEL_LENGTH)
        log = Path(scratch) / "server.log"
        sized = ["--dtype", options.dtype, "--kv-cache-memory-bytes", str(options.kv_cache_mib * MIB)]
        with serving(name, model, log, vllm_flags=[*VLLM_FLAGS, *sized], flags=["--max-queue", "64"]) as served:
            load = Load(
                served.port, str(model), workers=options.workers, plain=options.plain, chat=has_chat_template(model)
            )
            samples, begun_s = [], time.monotonic()
            while time.monotonic() < begun_s + options.minutes * 60:
                load.go()
                time.sleep(options.every)
                load.pause()
                requests = load.done.total()
                server = psutil.Process(served.process.pid)
                samples.append(measure(server, served.port, begun_s, requests, plain=options.plain))
            load.end()
        tracebacks = log.read_text(errors="replace").count("Traceback")
    served_as = f"{name}, {options.model.name if options.model else 'a tiny model'} in {options.dtype}"
    text = report(samples, load, tracebacks, name=served_as, plain=reference)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
        raw = json.dumps([asdict(sample) for sample in samples])
        options.out.with_suffix(".json").write_text(raw + "\n", encoding="utf-8")
    if load.unexpected or tracebacks or not set(verdicts(samples, reference).values()) <= {"no leak", "yes"}:
        raise SystemExit("not passed")


def report(samples: Sequence[Sample], load: Load, tracebacks: int, *, name: str, plain: Sequence[Sample] | None) -> str:
    """Report the run in Markdown."""
    kept, machine = settled(samples), describe()
    requests = [sample.requests for sample in kept]
    grown = {
        "HTTP process": slope(requests, [sample.http_bytes for sample in kept]),
        "engine": engine_growth(samples),
    }
    if plain:
        grown["engine beyond plain vLLM's"] = engine_excess(samples, plain)
    kinds = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(load.done.items()))
    told = [
        f"{datetime.now(UTC).date().isoformat()}, {machine['cpu_model']}, {machine['cpu_cores']} cores; "
        f"{name}; {samples[-1].at_s / 60:.1f} minutes, {samples[-1].requests} actions of clients: {kinds}.",
        "",
        table(samples),
        "",
        "Memory per action after the first quarter: "
        + ", ".join(f"{name} {one.median:.0f} bytes ({one.low:.0f} to {one.high:.0f})" for name, one in grown.items())
        + f"; a leak is a 95 % interval above {LEAK_BYTES}.",
        "",
        *(f"- {name}: {verdict}" for name, verdict in verdicts(samples, plain).items()),
        f"- unexpected answers: {len(load.unexpected)}"
        + (f", the first: {load.unexpected[0]}" if load.unexpected else ""),
        f"- tracebacks in the server's log: {tracebacks}",
    ]
    return "\n".join(told)


if __name__ == "__main__":
    main()
