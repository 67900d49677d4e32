"""Warm-up and paired rounds of two engines that take turns."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from pat_serve.server.analysis.trace import BatchTrace, prompts_digest
from pat_serve.server.bench.speedup.analysis import latency_s
from pat_serve.server.bench.speedup.grid import Cell
from pat_serve.server.bench.speedup.result import Round, WarmUp
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.cpu_watch import CpuWatch
from pat_serve.server.engine.workers.process import EngineProcess

# Two runs that differ by less than this count as the same: smaller changes are noise on most machines.
_STATIONARY = 0.1
# Without two warm-up runs that agree there is no verdict, so there must be enough runs for noise of 10 %, which a
# verdict bears. With such noise two runs agree in both phases once in four times.
_MIN_WARMUP_RUNS, MAX_WARMUP_RUNS = 2, 8
# A warm-up needs each kind of step, but not many steps.
_WARMUP_TOKENS = 5

# Seconds that an engine decodes before it is the other's turn. A machine's speed drifts over seconds (clock,
# neighbours' memory traffic). Turns must be shorter than the drift, and much longer than the microseconds that waking
# threads costs.
_TURN_S = 0.2


def warm_up(engine: EngineProcess, settings: SpeedupSettings, vocab_size: int) -> WarmUp:
    """Run each batch until two runs in a row agree, within bounds; the one with the most tokens comes last."""
    cells = sorted(settings.cells, key=lambda cell: (cell.batch_size * cell.prompt_tokens, cell.batch_size))
    warmed = [_warm_up_batch(engine, settings.with_cell(cell), vocab_size) for cell in cells]
    return WarmUp(
        traces=tuple(trace for one in warmed for trace in one.traces), stationary=all(one.stationary for one in warmed)
    )


def _warm_up_batch(engine: EngineProcess, settings: SpeedupSettings, vocab_size: int) -> WarmUp:
    tokens = min(settings.generated_tokens, _WARMUP_TOKENS)
    traces: list[BatchTrace] = []
    stationary = False
    while not stationary and len(traces) < MAX_WARMUP_RUNS:
        prompts = round_prompts(settings, vocab_size, -1 - len(traces))
        trace = engine.prefill(prompts, output_tokens=tokens) or engine.decode(tokens)
        # A batch prefilled in pieces needs some steps more than it has tokens.
        while trace is None:
            trace = engine.decode(1)
        traces.append(trace)
        stationary = is_stationary(traces, settings)
    return WarmUp(traces=tuple(traces), stationary=stationary)


def is_stationary(traces: Sequence[BatchTrace], settings: SpeedupSettings) -> bool:
    """Whether the last two warm-up runs agree."""
    return len(traces) >= _MIN_WARMUP_RUNS and all(
        abs(latency_s(traces[-1], regime) / latency_s(traces[-2], regime) - 1) < _STATIONARY
        for regime in settings.regimes
    )


def steps_per_turn(warm_ups: list[WarmUp], cell: Cell | None = None, candidate_batch: int | None = None) -> int:
    """Decode steps that an engine makes before it is the other's turn; the same for both, so that pairs match.

    Args:
        warm_ups: of both engines.
        cell: of the baseline's batch that is about to be measured; None for any.
        candidate_batch: the candidate's batch size, where it is another one.
    """

    def fits(trace: BatchTrace) -> bool:
        if cell is None:
            return True
        sizes = (cell.batch_size, candidate_batch or cell.batch_size)
        return trace.batch_size in sizes and trace.prompt_tokens in (None, cell.prompt_tokens)

    last = [trace for warm in warm_ups for trace in [one for one in warm.traces if fits(one)][-1:]]
    steps_s = [step_s for trace in last for step_s in trace.decode_steps_s]
    return math.ceil(_TURN_S / max(steps_s)) if steps_s else 1


def run_round(
    baseline: EngineProcess,
    candidate: EngineProcess,
    settings: SpeedupSettings,
    *,
    candidate_batch: int | None = None,
    vocab_size: int,
    index: int,
    turn_steps: int,
) -> Round:
    """Make one pair: both engines prefill the same prompts, then decode them in short turns.

    The order is swapped from round to round, and within a round from turn to turn (ABBA).

    Args:
        baseline: engine of the baseline.
        candidate: engine of the candidate.
        settings: gives batch, prompt and output.
        candidate_batch: the candidate's batch size where it is a larger one; the candidate then gets the baseline's
            prompts and more.
        vocab_size: of both models.
        index: of the round.
        turn_steps: decode steps in a turn.

    Raises:
        EngineError: an engine failed, or worked on other token ids than it was sent.
    """
    prompts = {
        engine: round_prompts(settings.with_batch(size), vocab_size, index)
        for engine, size in ((baseline, settings.batch_size), (candidate, candidate_batch or settings.batch_size))
    }
    order = (baseline, candidate) if index % 2 == 0 else (candidate, baseline)
    watch = CpuWatch()
    traces: dict[EngineProcess, BatchTrace] = {}
    for turn in itertools.count():
        engines = order if turn % 2 == 0 else order[::-1]
        for running, waiting in (engines, engines[::-1]):
            if running in traces:
                continue
            with watch.turn(running, waiting):
                trace = (
                    running.decode(turn_steps)
                    if turn
                    else running.prefill(prompts[running], output_tokens=settings.generated_tokens)
                )
            if trace is not None:
                traces[running] = trace
        if len(traces) == 2:
            break
    for engine, trace in traces.items():
        # With fixed memory each engine has prompts of its own.
        sent = prompts_digest(prompts[engine])
        if trace.prompts_sha256 != sent:
            raise engine.error(
                f"the token ids that it was sent in round {index} (SHA-256 {sent[:12]})",
                f"others in its answers ({trace.prompts_sha256[:12]})",
            )
    return Round(
        first="baseline" if order[0] is baseline else "candidate",
        prompts_sha256=prompts_digest(prompts[baseline]),
        baseline=traces[baseline],
        candidate=traces[candidate],
        other_cpu_share=watch.other_share,
        waiting_engine_cpu_share=watch.waiting_share,
    )


def round_prompts(settings: SpeedupSettings, vocab_size: int, index: int) -> list[list[int]]:
    """Token ids of one round: both models get the same.

    Where prefill is judged, no two rounds share any prompt, so no cache can help. Where decode alone is judged, all
    rounds have the same prompts, so only the first has to prefill them.

    Args:
        settings: gives batch size, prompt length and seed.
        vocab_size: ids are drawn evenly from [0, vocab_size).
        index: of the round; warm-up runs have negative ones.
    """
    draw = random.Random(f"{settings.seed}/{0 if settings.repeats_prompts else index}")
    return [[draw.randrange(vocab_size) for _ in range(settings.prompt_tokens)] for _ in range(settings.batch_size)]
