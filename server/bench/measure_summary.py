"""From raw timestamps to latency cells and throughput runs, with their ceilings. Pure mathematics."""

from __future__ import annotations

from collections.abc import Sequence

from pat_serve.server.analysis.roofline import ModelShape, decode_bytes, decode_flops, prefill_bytes, prefill_flops
from pat_serve.server.analysis.trace import BatchTrace, RequestTrace
from pat_serve.server.bench.measure_result import (
    LatencyCell,
    Roof,
    ThroughputRun,
    ThroughputSettings,
    distribution,
)
from pat_serve.server.workers.probe import MachineRates


def prefill_floor_s(
    shape: ModelShape, rates: MachineRates, *, batch_size: int, prompt_tokens: int, dtype_bytes: int
) -> float:
    """The least seconds of a prefill on this machine."""
    return rates.floor_s(
        read_bytes=prefill_bytes(shape, batch_size=batch_size, prompt_tokens=prompt_tokens, dtype_bytes=dtype_bytes),
        flops=prefill_flops(shape, batch_size=batch_size, prompt_tokens=prompt_tokens),
    )


def decode_floor_s(
    shape: ModelShape, rates: MachineRates, *, batch_size: int, context_tokens: float, dtype_bytes: int
) -> float:
    """The least seconds of a decode step on this machine."""
    return rates.floor_s(
        read_bytes=decode_bytes(shape, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=dtype_bytes),
        flops=decode_flops(shape, batch_size=batch_size, context_tokens=context_tokens),
    )


def latency_cell(
    traces: Sequence[BatchTrace],
    *,
    prompt_tokens: int,
    output_tokens: int,
    shape: ModelShape,
    rates: MachineRates | None,
    dtype_bytes: int,
) -> LatencyCell:
    """Distributions over rounds, beside their ceilings.

    Args:
        traces: of the rounds, one at least, all with the same batch size.
        prompt_tokens: of each request.
        output_tokens: of each request; without a second token there is no time between two.
        shape: the model.
        rates: the machine's; None leaves the ceilings out.
        dtype_bytes: bytes of a weight and of a KV value.
    """
    batch_size = traces[0].batch_size
    ttft = distribution([trace.ttft_s for trace in traces])
    steps_s = [trace.decode_steps_s for trace in traces]
    itl = distribution([step_s for steps in steps_s for step_s in steps]) if all(steps_s) else None
    tpot = distribution([sum(steps) / len(steps) for steps in steps_s]) if all(steps_s) else None
    ttft_roof = tpot_roof = None
    if rates is not None:
        floor_s = prefill_floor_s(
            shape, rates, batch_size=batch_size, prompt_tokens=prompt_tokens, dtype_bytes=dtype_bytes
        )
        ttft_roof = Roof(floor_s=floor_s, reached=floor_s / ttft.p50)
        if tpot is not None:
            floor_s = decode_floor_s(
                shape,
                rates,
                batch_size=batch_size,
                context_tokens=prompt_tokens + output_tokens / 2,
                dtype_bytes=dtype_bytes,
            )
            tpot_roof = Roof(floor_s=floor_s, reached=floor_s / tpot.p50)
    return LatencyCell(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft=ttft,
        itl=itl,
        tpot=tpot,
        e2e=distribution([trace.e2e_s for trace in traces]),
        ttft_roof=ttft_roof,
        tpot_roof=tpot_roof,
        traces=tuple(traces),
    )


def throughput_run(
    requests: Sequence[RequestTrace],
    *,
    concurrency: int,
    settings: ThroughputSettings,
    shape: ModelShape,
    rates: MachineRates | None,
    dtype_bytes: int,
) -> ThroughputRun:
    """Tokens and requests a second over a run, beside what decode steps and prefills allow at least.

    Args:
        requests: all of the run, each of the settings' length.
        concurrency: requests in flight.
        settings: gives the lengths.
        shape: the model.
        rates: the machine's; None leaves the ceiling out.
        dtype_bytes: bytes of a weight and of a KV value.
    """
    duration_s = max(one.tokens_s[-1] for one in requests) - min(one.submitted_s for one in requests)
    tokens = sum(len(one.tokens_s) for one in requests)
    gaps_s = [
        (one.tokens_s[-1] - one.tokens_s[0]) / (len(one.tokens_s) - 1) for one in requests if len(one.tokens_s) > 1
    ]
    roof = None
    if rates is not None:
        prompt, output = settings.prompt_tokens, settings.output_tokens
        # A wave: everybody's prefill, then everybody's steps.
        wave_s = prefill_floor_s(
            shape, rates, batch_size=concurrency, prompt_tokens=prompt, dtype_bytes=dtype_bytes
        ) + (output - 1) * decode_floor_s(
            shape, rates, batch_size=concurrency, context_tokens=prompt + output / 2, dtype_bytes=dtype_bytes
        )
        roof = concurrency * output / wave_s
    return ThroughputRun(
        concurrency=concurrency,
        duration_s=duration_s,
        output_tokens_per_s=tokens / duration_s,
        requests_per_s=len(requests) / duration_s,
        ttft=distribution([one.tokens_s[0] - one.submitted_s for one in requests]),
        tpot=distribution(gaps_s) if gaps_s else None,
        roof_tokens_per_s=roof,
        requests=tuple(requests),
    )
