"""`/benchmark/speedup` checks a claim on a live server: its engine and the baseline's work in turns.

The claim is judged by the same analysis as in `pat-bench speedup`. Only the seat of the clock differs: both engines are
asked through this server's own front end, and a turn is a whole batch (docs/design.md says why).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import psutil
from fastapi import Request

from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.server.analysis.trace import BatchTrace, prompts_digest
from pat_serve.server.bench.model_source import config_sha256
from pat_serve.server.bench.speedup.conclusion import Beginning, Disturbance, sum_up
from pat_serve.server.bench.speedup.grid import Named, Regime
from pat_serve.server.bench.speedup.result import DepthMeasurement, ModelRecord, Round, WarmUp
from pat_serve.server.bench.speedup.rounds import MAX_WARMUP_RUNS, is_stationary, round_prompts
from pat_serve.server.bench.speedup.series import Pair
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.baseline import Baseline, available
from pat_serve.server.engine.online import Engine
from pat_serve.server.engine.workers.cpu_watch import CpuWatch
from pat_serve.server.engine.workers.process_group import ProcessGroup
from pat_serve.server.http.errors import HttpError, InvalidRequestError
from pat_serve.server.routes.benchmark_roofline import countable_shape
from pat_serve.server.routes.exclusive import Exclusive
from pat_serve.server.routes.measure import benchmark_request, together
from pat_serve.server.routes.speedup_request import LiveSpeedupResult, SpeedupRequest
from pat_serve.shapes.sizes import ModelSizes

# vLLM's worker spins for a second after its last step, and the other engine's turn would begin with a core less.
_SETTLE_S, _SETTLE_POLL_S, _QUIET_SHARE = 2.0, 0.05, 0.2


class Side:
    """One of the two engines, with its processes, whose CPU time and memory a check reads."""

    def __init__(self, engine: Engine, processes: ProcessGroup, start_s: float) -> None:
        self.engine = engine
        self.processes = processes
        self.start_s = start_s

    async def batch(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> BatchTrace:
        """Run a batch to its end."""
        submitted_s = time.monotonic()
        times_s = await together([self._token_times(prompt, output_tokens) for prompt in prompts])
        longest = max(map(len, prompts))
        return batch_trace(submitted_s, times_s, prompts_sha256=prompts_digest(prompts), prompt_tokens=longest)

    async def settle(self) -> None:
        """Wait until the engine's processes rest, for a short while at most."""
        deadline_s = time.monotonic() + _SETTLE_S
        used_s, at_s = self.processes.cpu_s(), time.monotonic()
        while time.monotonic() < deadline_s:
            await asyncio.sleep(_SETTLE_POLL_S)
            now_used_s, now_s = self.processes.cpu_s(), time.monotonic()
            if now_used_s - used_s < _QUIET_SHARE * (now_s - at_s):
                return
            used_s, at_s = now_used_s, now_s

    async def _token_times(self, prompt: Sequence[int], output_tokens: int) -> list[float]:
        """The time at which each token came, on the monotonic clock."""
        generation = benchmark_request(self.engine, prompt, output_tokens)
        await generation.run()
        times_s = generation.token_times_s()
        if len(times_s) != output_tokens:
            # An engine that is stopped ends its requests without an error.
            raise HttpError(503, "stopping", "the server is stopping; the check has ended without a result")
        return times_s


def batch_trace(
    submitted_s: float,
    requests: Sequence[Sequence[float]],
    *,
    prompts_sha256: str,
    prompt_tokens: int | None = None,
) -> BatchTrace:
    """A batch as its slowest request saw it: a step ends when each request has one token more.

    Args:
        submitted_s: time just before the first request was sent.
        requests: the times of each request's tokens; equally many for all.
        prompts_sha256: of the prompts.
        prompt_tokens: of each of them.
    """
    ended_s = tuple(max(column) for column in zip(*requests, strict=True))
    return BatchTrace(
        batch_size=len(requests),
        submitted_s=submitted_s,
        steps_started_s=(submitted_s, *ended_s[:-1]),
        steps_ended_s=ended_s,
        steps_tokens=(len(requests),) * len(ended_s),
        first_token_step=0,
        prompts_sha256=prompts_sha256,
        prompt_tokens=prompt_tokens,
    )


async def check_live_speedup(
    candidate: Side, running: Baseline | None, exclusive: Exclusive, body: SpeedupRequest, http: Request
) -> LiveSpeedupResult:
    """Run the check.

    Raises:
        HttpError: 400 the requests do not fit, 409 another benchmark runs or users are being served, 503 it took too
            long.
        BaselineMissing: there is no baseline.
        BaselineDead: its engine died.
        ClientGoneError: the client left; nothing of the check runs on.
    """
    other = available(running)
    baseline = Side(other.engine, other.processes, other.start_s)
    shapes = _shapes(baseline, candidate)
    settings = _settings(body, candidate.engine)
    _check_fit(settings, (baseline, candidate))
    begun = Beginning.now()
    work = _measure(baseline, candidate, settings)
    (warm_ups, rounds), others = await exclusive.run(http, work, sequences=settings.largest_batch, force=body.force)
    # The bootstrap takes a moment, in which the loop has others to serve.
    return await asyncio.to_thread(_judge, baseline, candidate, shapes, settings, warm_ups, rounds, others, begun=begun)


async def _measure(baseline: Side, candidate: Side, settings: SpeedupSettings) -> tuple[list[WarmUp], list[Round]]:
    vocab_size = candidate.engine.vocab_size
    warm_ups = [await _warm_up(side, settings, vocab_size) for side in (baseline, candidate)]
    await candidate.settle()
    rounds = []
    for index in range(settings.rounds):
        numbered = list(enumerate(settings.cells))
        for number, cell in numbered if index % 2 == 0 else reversed(numbered):
            # The batches of a round share no prompt: an engine that serves users keeps a cache of prefixes.
            prompts = round_prompts(settings.with_cell(cell), vocab_size, index * len(numbered) + number)
            rounds.append(await _round(baseline, candidate, prompts, settings.generated_tokens, index))
    return warm_ups, rounds


async def _warm_up(side: Side, settings: SpeedupSettings, vocab_size: int) -> WarmUp:
    """Run each batch until two runs in a row agree, within bounds."""
    made: list[BatchTrace] = []
    settled = True
    for number, cell in enumerate(settings.cells):
        own, traces = settings.with_cell(cell), list[BatchTrace]()
        while len(traces) < MAX_WARMUP_RUNS and not is_stationary(traces, own):
            prompts = round_prompts(own, vocab_size, -1 - len(traces) - MAX_WARMUP_RUNS * number)
            traces.append(await side.batch(prompts, settings.generated_tokens))
        made += traces
        settled = settled and is_stationary(traces, own)
    return WarmUp(traces=tuple(made), stationary=settled)


async def _round(
    baseline: Side, candidate: Side, prompts: Sequence[Sequence[int]], output_tokens: int, index: int
) -> Round:
    """Run one batch on both engines, one after the other; the engine that begins alternates with the index."""
    watch, traced = CpuWatch(ProcessGroup([psutil.Process()])), dict[Side, BatchTrace]()
    # A drift of the machine favours neither.
    order = (baseline, candidate) if index % 2 == 0 else (candidate, baseline)
    for side, waiting in (order, order[::-1]):
        with watch.turn(side.processes, waiting.processes):
            traced[side] = await side.batch(prompts, output_tokens)
        await side.settle()
    return Round(
        first="baseline" if order[0] is baseline else "candidate",
        prompts_sha256=prompts_digest(prompts),
        baseline=traced[baseline],
        candidate=traced[candidate],
        other_cpu_share=watch.other_share,
        waiting_engine_cpu_share=watch.waiting_share,
    )


def _judge(
    baseline: Side,
    candidate: Side,
    shapes: tuple[ModelSizes, ModelSizes],
    settings: SpeedupSettings,
    warm_ups: list[WarmUp],
    rounds: list[Round],
    others: int,
    *,
    begun: Beginning,
) -> LiveSpeedupResult:
    dtype = candidate.engine.dtype
    pair = Pair(
        baseline=shapes[0],
        candidate=shapes[1],
        candidate_batch=None,
        settings=settings,
        dtype_bytes=DTYPE_BYTES[dtype],
    )
    measured = DepthMeasurement(
        layers=shapes[0].layers,
        baseline=_record(baseline, shapes[0], warm_ups[0]),
        candidate=_record(candidate, shapes[1], warm_ups[1]),
        regimes=pair.analyse(rounds, warm_ups),
        rounds=tuple(rounds),
        stopped=f"{settings.rounds} rounds were asked for",
    )
    # Users' work runs on the served engine alone: beside the baseline's turns, and in the batches of the engine's own
    # turns. The two sides are then no longer alike, however quiet the rounds look.
    disturbance = Disturbance(
        told=f"{others} requests of users ran meanwhile, which the two engines do not share alike",
        way_out="without `force`, while no users are being served",
    )
    result = sum_up(
        [measured],
        settings,
        begun=begun,
        dtype=dtype,
        seconds_per_round=(time.monotonic() - begun.at_s) / settings.rounds,
        disturbance=disturbance if others else None,
    )
    return LiveSpeedupResult(**dict(result), other_requests=others)


def _record(side: Side, shape: ModelSizes, warmed: WarmUp) -> ModelRecord:
    return ModelRecord(
        name=side.engine.model_name,
        config_sha256=config_sha256(side.engine.config),
        shape=shape,
        parameters=shape.parameters,
        start_s=side.start_s,
        peak_memory_bytes=side.processes.peak_memory_bytes(),
        warm_up=warmed,
    )


def _shapes(baseline: Side, candidate: Side) -> tuple[ModelSizes, ModelSizes]:
    shapes = countable_shape(baseline.engine), countable_shape(candidate.engine)
    if shapes[0] is None or shapes[1] is None:
        told = "the ceiling of a quantized or unusual model cannot be counted from its config, so no claim is judged"
        raise HttpError(409, "not_comparable", told)
    return shapes[0], shapes[1]


def _settings(body: SpeedupRequest, engine: Engine) -> SpeedupSettings:
    return SpeedupSettings(
        claim=body.claim,
        margin=body.margin,
        batch_size=body.batch_size,
        prompt_tokens=body.prompt_tokens,
        output_tokens=body.output_tokens,
        rounds=body.rounds,
        grid=tuple(one.cell for one in body.grid),
        named=tuple(Named(cell=one.cell, regime=Regime(one.regime) if one.regime else None) for one in body.claim_at),
        regimes=tuple(regime for regime in Regime if regime.value in body.regimes),
        dtype=engine.dtype,
        enforce_eager=engine.eager,
        # A probe would take the machine from the users for seconds; `pat-bench` makes one.
        roofline=False,
        seed=body.seed,
    )


def _check_fit(settings: SpeedupSettings, sides: Sequence[Side]) -> None:
    prompt_field, batch_field = ("grid", "grid") if settings.grid else ("prompt_tokens", "batch_size")
    length = min(side.engine.max_model_len for side in sides)
    if settings.tokens_per_request > length:
        told = f"prompt_tokens and output_tokens may be {length} together for both models; lower either"
        raise InvalidRequestError(f"{prompt_field}: {told}", prompt_field)
    step = min(side.engine.max_step_tokens for side in sides)
    if any(cell.batch_size * cell.prompt_tokens > step for cell in settings.cells):
        told = f"the engines prefill {step} tokens at once, and a batch in pieces has no prefill to compare"
        raise InvalidRequestError(f"{batch_field}: {told}; lower batch_size or prompt_tokens", batch_field)
    sequences = min(side.engine.max_num_seqs for side in sides)
    if settings.largest_batch > sequences:
        told = f"the engines run at most {sequences} requests at once"
        raise InvalidRequestError(f"{batch_field}: {told}", batch_field)
