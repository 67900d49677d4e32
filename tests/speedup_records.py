"""Made-up measurements with a known truth: what the statistics and reports are tested on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pat_serve.server.roofline import ModelShape
from pat_serve.server.speedup_result import Regime, Round, SpeedupSettings
from pat_serve.server.speedup_series import Pair
from pat_serve.server.trace import BatchTrace

DENSE = ModelShape(
    hidden_size=4096, num_layers=2, num_heads=32, num_kv_heads=32, head_dim=128, ffn_size=11008, vocab_size=32000,
    tied_head=False,
)  # fmt: skip
NARROW = ModelShape(**{**vars(DENSE), "hidden_size": 3072})


def trace(
    *, ttft_s: float, step_s: float, batch_size: int = 1, output_tokens: int = 5, begun_s: float = 100.0
) -> BatchTrace:
    """A batch whose engine took exactly so long."""
    starts, ends, now_s = [begun_s], [begun_s + ttft_s], begun_s + ttft_s
    for _ in range(output_tokens - 1):
        starts.append(now_s)
        now_s += step_s
        ends.append(now_s)
    return BatchTrace(
        batch_size=batch_size,
        submitted_s=begun_s,
        steps_started_s=tuple(starts),
        steps_ended_s=tuple(ends),
        steps_tokens=(batch_size,) * output_tokens,
        first_token_step=0,
        prompts_sha256="0" * 64,
    )


def rounds(
    count: int,
    *,
    ratio: float,
    noise: float = 0.01,
    drift: float = 0.0,
    stalled: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1,),
    candidate_batch: int | None = None,
    seed: int = 0,
) -> list[Round]:
    """Rounds of a candidate that is truly `ratio` times faster, on a machine with this noise, drift and stalls.

    Args:
        count: rounds, each with every batch size.
        ratio: true speed-up of both phases.
        noise: standard deviation of each measurement's own logarithm.
        drift: by how much the machine is slower in the last round than in the first.
        stalled: rounds in which one model took ten times as long.
        batch_sizes: of the baseline.
        candidate_batch: of the candidate where it differs.
        seed: of the noise.
    """
    draw = random.Random(seed)
    made = []
    for index in range(count):
        machine = 1 + drift * index / max(1, count - 1)
        for size in batch_sizes:
            factor = [machine * draw.lognormvariate(0, noise) for _ in range(2)]
            if index in stalled:
                factor[index % 2] *= 10
            made.append(
                Round(
                    first="baseline" if index % 2 == 0 else "candidate",
                    prompts_sha256="0" * 64,
                    baseline=trace(ttft_s=0.4 * size * factor[0], step_s=0.1 * factor[0], batch_size=size),
                    candidate=trace(
                        ttft_s=0.4 * size * factor[1] / ratio,
                        step_s=0.1 * factor[1] / ratio,
                        batch_size=candidate_batch or size,
                    ),
                    other_cpu_share=0.0,
                    waiting_engine_cpu_share=0.0,
                )
            )
    return made


def pair(**settings: object) -> Pair:
    """Both phases of the paper's shapes."""
    chosen = SpeedupSettings.model_validate({"regimes": (Regime.PREFILL, Regime.DECODE), **settings})
    return Pair(baseline=DENSE, candidate=NARROW, candidate_batch=None, settings=chosen, dtype_bytes=2)
