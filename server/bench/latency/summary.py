"""Latency cells and throughput runs with their ceilings, from raw timestamps. Pure mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pat_serve.server.analysis.trace import BatchTrace, RequestTrace
from pat_serve.server.bench.latency.result import LatencyCell, Roof, ThroughputRun, ThroughputSettings, distribution
from pat_serve.server.engine.workers.probe import MachineRates
from pat_serve.shapes.roofline import decode_flops, prefill_bytes, prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The least seconds that a machine needs for a model's work.

    Attributes:
        shape: the model.
        rates: the rates of the machine.
        dtype_bytes: bytes of a weight and of a KV value.
    """

    shape: ModelSizes
    rates: MachineRates
    dtype_bytes: int

    def prefill_s(self, *, batch_size: int, prompt_tokens: int) -> float:
        """The least seconds of a prefill."""
        read_bytes = prefill_bytes(
            self.shape, batch_size=batch_size, prompt_tokens=prompt_tokens, dtype_bytes=self.dtype_bytes
        )
        flops = prefill_flops(self.shape, batch_size=batch_size, prompt_tokens=prompt_tokens)
        return self.rates.floor_s(read_bytes=read_bytes, flops=flops)

    def decode_step_s(self, *, batch_size: int, context_tokens: float) -> float:
        """The least seconds of a decode step."""
        read_bytes = decode_bytes(
            self.shape, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=self.dtype_bytes
        )
        flops = decode_flops(self.shape, batch_size=batch_size, context_tokens=context_tokens)
        return self.rates.floor_s(read_bytes=read_bytes, flops=flops)


# Two probes of one machine that differ by more than this saw different machines.
_PROBES_AGREE = 1.1


def why_beaten(reached: float, probes: Sequence[MachineRates], *, read_bytes: float | None) -> str | None:
    """Explain a floor that is above the measured figure; None where the floor held.

    Args:
        reached: floor over the measured median.
        probes: of the machine, one at least.
        read_bytes: bytes that a decode step reads; None for a prefill, whose floor is arithmetic.
    """
    if reached <= 1:
        return None
    cache_bytes = probes[0].cache_bytes
    if read_bytes is not None and cache_bytes is not None and read_bytes <= cache_bytes:
        sizes = f"{read_bytes / 2**20:.1f} MiB, stays in the cache of {cache_bytes / 2**20:.0f} MiB"
        return f"what it reads, {sizes}, and the probe read memory"
    rates = [one.flops_per_s if read_bytes is None else one.bytes_per_s for one in probes]
    if max(rates) > _PROBES_AGREE * min(rates):
        found = f"{min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g} {'GFLOP' if read_bytes is None else 'GB'}/s"
        return f"the machine changed while it was probed ({found}): it was quicker in between"
    return "the probe was slower than the engine: the machine was busy while it ran, or it knows no kernel as quick"


def latency_cell(
    traces: Sequence[BatchTrace],
    *,
    prompt_tokens: int,
    output_tokens: int,
    floors: Floors | None,
    probes: Sequence[MachineRates] = (),
) -> LatencyCell:
    """Distributions over rounds, beside their ceilings.

    Args:
        traces: of the rounds, one at least, all with the same batch size.
        prompt_tokens: of each request.
        output_tokens: of each request; without a second token there is no time between two.
        floors: of the model on this machine; None leaves the ceilings out.
        probes: the probes that the floors stand on.
    """
    batch_size = traces[0].batch_size
    ttft = distribution([trace.ttft_s for trace in traces])
    steps_s = [trace.decode_steps_s for trace in traces]
    itl = distribution([step_s for steps in steps_s for step_s in steps]) if all(steps_s) else None
    tpot = distribution([sum(steps) / len(steps) for steps in steps_s]) if all(steps_s) else None
    ttft_roof = tpot_roof = None
    if floors is not None:
        floor_s = floors.prefill_s(batch_size=batch_size, prompt_tokens=prompt_tokens)

        def roof(floor_s: float, median_s: float, read_bytes: float | None = None) -> Roof:
            told = why_beaten(floor_s / median_s, probes or [floors.rates], read_bytes=read_bytes)
            return Roof(floor_s=floor_s, reached=floor_s / median_s, beaten_by=told)

        ttft_roof = roof(floor_s, ttft.p50)
        if tpot is not None:
            floor_s = floors.decode_step_s(batch_size=batch_size, context_tokens=prompt_tokens + output_tokens / 2)
            read_bytes = decode_bytes(
                floors.shape, batch_size=batch_size, context_tokens=prompt_tokens, dtype_bytes=floors.dtype_bytes
            )
            tpot_roof = roof(floor_s, tpot.p50, read_bytes)
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
    floors: Floors | None,
) -> ThroughputRun:
    """Tokens and requests a second over a run, beside what decode steps and prefills allow at least.

    Args:
        requests: all of the run, each of the settings' length.
        concurrency: requests in flight.
        settings: gives the lengths.
        floors: of the model on this machine; None leaves the ceiling out.
    """
    duration_s = max(one.tokens_s[-1] for one in requests) - min(one.submitted_s for one in requests)
    tokens = sum(len(one.tokens_s) for one in requests)
    gaps_s = [
        (one.tokens_s[-1] - one.tokens_s[0]) / (len(one.tokens_s) - 1) for one in requests if len(one.tokens_s) > 1
    ]
    roof = None
    if floors is not None:
        prompt, output = settings.prompt_tokens, settings.output_tokens
        # A wave is the prefill of all requests, then the steps of all requests.
        prefill_s = floors.prefill_s(batch_size=concurrency, prompt_tokens=prompt)
        step_s = floors.decode_step_s(batch_size=concurrency, context_tokens=prompt + output / 2)
        roof = concurrency * output / (prefill_s + (output - 1) * step_s)
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
