"""Both models behind servers of equal memory, loaded in turns by guidellm; the claim is about goodput.

Both servers are up all the time, and one is loaded at a time: a drift of the machine meets both halves of a round.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pat_serve.errors import UsageError, want
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES, describe, serving_dtype
from pat_serve.server.analysis.capacity import Capacity, capacity, memory_for
from pat_serve.server.analysis.verdict import MARGIN_BOUND, MIN_ROUNDS
from pat_serve.server.bench.equal_memory.result import (
    EqualMemoryResult,
    EqualMemorySettings,
    MemoryModel,
    MemoryRound,
    Role,
    conclude,
    ratio_of,
)
from pat_serve.server.bench.equal_memory.serving import Serving, serving
from pat_serve.server.bench.load.result import LoadRun, LoadSettings
from pat_serve.server.bench.load.run import check_load, run_load
from pat_serve.server.bench.model_source import ModelSource, check_dtype, config_sha256, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speedup.checks import check_context
from pat_serve.server.engine.memory import PROCESS_BYTES, WEIGHT_COPIES, require_memory
from pat_serve.server.engine.workers.cpu_watch import CpuWatch

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]
# guidellm's prompts of synthetic text have some tokens more than were asked for, in another tokenizer's count.
_SPARE_TOKENS = 64
_WARM_UP_SECONDS, _WARM_UP_RATE = 2.0, 4.0
# Fewer requests than these are expected in a run: the run may send none at all, and its goodput says nothing.
_FEWEST_REQUESTS = 10


class _Client:
    """This process and guidellm, as far as it has ended; the servers are still running and do not count."""

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


def measure_equal_memory(
    baseline: str, candidate: str, settings: EqualMemorySettings, *, progress: Progress
) -> EqualMemoryResult:
    """Load both models' servers in turns, and judge the claim.

    Args:
        baseline: the dense model's folder.
        candidate: the smaller model's folder.
        settings: memory, load and claim.
        progress: called with news as it goes.

    Raises:
        MissingExtra: vLLM or guidellm is not installed.
        UsageError: settings that make no sense, or memory that does not hold one request of a model.
        ModelError: a model that is not there or not readable.
        EngineError: not enough memory, or a server or guidellm failed.
    """
    check_settings(settings)
    require("vllm", "cpu", "cuda", wanted_by="pat-bench equal-memory")
    require("guidellm", "bench", wanted_by="pat-bench equal-memory")
    date, begun_s, dtype = (
        datetime.now(UTC).isoformat(timespec="seconds"),
        time.monotonic(),
        serving_dtype(settings.dtype),
    )
    with scratch_folder() as scratch:
        sources: dict[Role, ModelSource] = {
            "baseline": _source("baseline", baseline, scratch),
            "candidate": _source("candidate", candidate, scratch),
        }
        for source in sources.values():
            check_dtype(source, dtype)
        budget_bytes = budget(sources["baseline"], settings, DTYPE_BYTES[dtype])
        shares = {role: share(one, budget_bytes, settings, DTYPE_BYTES[dtype]) for role, one in sources.items()}
        for source in sources.values():
            check_context(source, settings.prompt_tokens + settings.output_tokens + _SPARE_TOKENS)
        _check_memory(shares, dtype)

        def server(role: Role) -> AbstractContextManager[Serving]:
            return serving(
                sources[role].path,
                kv_cache_bytes=budget_bytes - shares[role].weight_bytes,
                max_model_tokens=settings.prompt_tokens + settings.output_tokens + _SPARE_TOKENS,
                dtype=dtype,
                log=scratch / f"{role}.log",
            )

        progress("starting two servers", 0, settings.rounds)
        with server("baseline") as first, server("candidate") as second:
            started: dict[Role, Serving] = {"baseline": first, "candidate": second}
            for one in started.values():
                _warm_up(one, settings)
            rounds = []
            for index in range(settings.rounds):
                progress("loading", index, settings.rounds)
                rounds.append(_round(started, settings, index))
            peaks = {role: one.processes.peak_memory_bytes() for role, one in started.items()}
    judgement = conclude(rounds, settings)

    def record(role: Role) -> MemoryModel:
        source = sources[role]
        return MemoryModel(
            name=source.name,
            config_sha256=config_sha256(source.config),
            shape=source.shape,
            capacity=shares[role],
            kv_cache_bytes=budget_bytes - shares[role].weight_bytes,
            ready_s=started[role].ready_s,
            peak_memory_bytes=peaks[role],
        )

    return EqualMemoryResult(
        date=date,
        duration_s=time.monotonic() - begun_s,
        machine=describe(),
        guidellm=version("guidellm"),
        dtype=dtype,
        settings=settings,
        memory_bytes=budget_bytes,
        baseline=record("baseline"),
        candidate=record("candidate"),
        rounds=tuple(rounds),
        goodput_ratio=ratio_of(
            [one.goodput_per_s("baseline") for one in rounds],
            [one.goodput_per_s("candidate") for one in rounds],
            seed=settings.seed,
        ),
        tokens_ratio=ratio_of(
            [one.tokens_per_s("baseline") for one in rounds],
            [one.tokens_per_s("candidate") for one in rounds],
            seed=settings.seed,
        ),
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
    )


def check_settings(settings: EqualMemorySettings) -> None:
    """Refuse settings that cannot be measured.

    Raises:
        UsageError: naming the flag.
    """
    claim_fine = math.isfinite(settings.claim) and settings.claim > 0
    want("--claim", claim_fine, "a ratio above 0", settings.claim, "Try --claim 1.2.")
    expected = f"a share from 0 to below {MARGIN_BOUND:g}"
    want("--margin", 0 <= settings.margin < MARGIN_BOUND, expected, settings.margin, "Try --margin 0.02 for 2 %.")
    gib = settings.memory_gib
    want("--memory-gib", gib is None or 0 < gib < math.inf, "above 0", gib, "Leave it out, and give --requests.")
    want("--requests", settings.requests >= 1, "at least 1", settings.requests, "Try --requests 8.")
    want("--rounds", settings.rounds >= MIN_ROUNDS, f"at least {MIN_ROUNDS}", settings.rounds, "Try --rounds 5.")
    want("--seed", 0 <= settings.seed < 2**31, "0 to 2147483647", settings.seed, "Try --seed 0.")
    want("--slo", bool(settings.slo), "one bound at least", "none", "Try --slo ttft=1 --slo tpot=0.1.")
    check_load(_load_settings("http://127.0.0.1", settings, settings.rates, 0))
    fewest = min(settings.rates) * settings.seconds
    want(
        "--seconds",
        fewest >= _FEWEST_REQUESTS,
        f"{_FEWEST_REQUESTS} requests or more in a run of the lowest --rate",
        f"{fewest:g}",
        f"Try --seconds {math.ceil(_FEWEST_REQUESTS / min(settings.rates))}, or a higher --rate.",
    )


def budget(baseline: ModelSource, settings: EqualMemorySettings, dtype_bytes: int) -> int:
    """Bytes for weights and KV cache of each model: as given, or as the baseline takes with its requests."""
    if settings.memory_gib is not None:
        return int(settings.memory_gib * 2**30)
    tokens = settings.prompt_tokens + settings.output_tokens
    return memory_for(baseline.shape, requests=settings.requests, tokens=tokens, dtype_bytes=dtype_bytes)


def share(source: ModelSource, memory_bytes: int, settings: EqualMemorySettings, dtype_bytes: int) -> Capacity:
    """The requests of a model that the memory holds.

    Raises:
        UsageError: not even one.
    """
    tokens = settings.prompt_tokens + settings.output_tokens
    found = capacity(source.shape, memory_bytes=memory_bytes, tokens=tokens, dtype_bytes=dtype_bytes)
    if found.requests < 1:
        raise UsageError(
            "--memory-gib",
            expected=f"room for the weights of {source.name} and a request of {tokens} tokens: "
            f"{(found.weight_bytes + found.kv_bytes_per_request) / 2**30:.3g} GiB",
            found=f"{memory_bytes / 2**30:.3g} GiB",
            fix="Give more memory, or shorter requests.",
        )
    return found


def _source(role: Role, name: str, scratch: Path) -> ModelSource:
    return resolve(name, flag=f"--{role}", load_format="auto", layers=None, scratch=scratch)


def _check_memory(shares: dict[Role, Capacity], dtype: str) -> None:
    needed = sum(
        int(WEIGHT_COPIES * one.weight_bytes) + (one.memory_bytes - one.weight_bytes) + 2 * PROCESS_BYTES
        for one in shares.values()
    )
    require_memory("two servers side by side", needed, dtype=dtype, fix="Give less --memory-gib, or free memory.")


def _round(started: dict[Role, Serving], settings: EqualMemorySettings, index: int) -> MemoryRound:
    order: tuple[Role, Role] = ("baseline", "candidate") if index % 2 == 0 else ("candidate", "baseline")
    watch, runs = CpuWatch(_Client()), dict[Role, tuple[LoadRun, ...]]()
    for role, waiting in (order, order[::-1]):
        with watch.turn(started[role].processes, started[waiting].processes):
            runs[role] = _load(started[role], settings, settings.rates, index)
    return MemoryRound(
        first=order[0], baseline=runs["baseline"], candidate=runs["candidate"], other_cpu_share=watch.other_share
    )


def _warm_up(one: Serving, settings: EqualMemorySettings) -> None:
    # Constant arrivals, some each second. At a low rate none may come in so short a run, which guidellm cannot report.
    short = _load_settings(one.url, settings, (_WARM_UP_RATE,), settings.seed)
    run_load(short.model_copy(update={"seconds": _WARM_UP_SECONDS, "profile": "constant"}), api_key=None)


def _load(one: Serving, settings: EqualMemorySettings, rates: tuple[float, ...], index: int) -> tuple[LoadRun, ...]:
    # Both models get the same prompts and arrivals in a round, and others in the next.
    return run_load(_load_settings(one.url, settings, rates, settings.seed + 1 + index), api_key=None).runs


def _load_settings(url: str, settings: EqualMemorySettings, rates: tuple[float, ...], seed: int) -> LoadSettings:
    return LoadSettings(
        url=url,
        rates=rates,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        seconds=settings.seconds,
        slo=settings.slo,
        seed=seed,
    )
