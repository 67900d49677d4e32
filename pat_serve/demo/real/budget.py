"""Compute what fits into the demo's ten minutes on this machine, from one measured speed.

Machines differ threefold and more, so a probe decides the number of training steps: a forward and a backward pass of
the parent over about the tokens of one step. All other costs are seconds and multiples of the probe. They are estimates
from whole runs (`LOG.md`, 2026-11-29 and 30).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

TOTAL_S = 600.0
# A conversation has 100 tokens on average, and none is longer than a row.
STEP_ROWS = 16
ROW_TOKENS = 256
PROBE_TOKENS = 2048
# From timings.json and metrics.jsonl of whole runs on two machines, idle, 2026-11-30. A probe took 5.0 s on machine Z
# and 2.5 s on machine X, so what does not go by the probe shows.
# The start has the probing itself and the work of pat-train before its first step: 21 and 16 probes.
START_PROBES = 21.0
# A step: 1.45 and 1.6 probes.
STEP_PROBES = 1.6
# The end has an export, an evaluation and two engines: 249 s and 183 s. An engine's start depends little on the probe.
AFTER_S = 118.0
AFTER_PROBES = 26.0
# Fewer steps teach nothing, so the demo takes longer than ten minutes instead. More steps read the text so often that
# the model learns it by heart.
LEAST_STEPS, MOST_STEPS = 16, 240


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time and the steps that the demo grants the training.

    Attributes:
        probe_s: seconds of a forward and a backward pass of the parent over `PROBE_TOKENS` tokens.
        before_s: seconds that the demo had taken when the training was planned.
        steps: optimizer steps.
        fits: whether the demo is expected to end within `TOTAL_S`.
    """

    probe_s: float
    before_s: float
    steps: int
    fits: bool


def plan(*, probe_s: float, before_s: float) -> Budget:
    """Plan the number of steps that fit.

    Args:
        probe_s: measured seconds of the probe, greater than 0.
        before_s: seconds that the earlier stages took.
    """
    training_s = TOTAL_S - before_s - AFTER_S - (START_PROBES + AFTER_PROBES) * probe_s
    fitting = int(training_s // (STEP_PROBES * probe_s))
    steps = min(max(fitting, LEAST_STEPS), MOST_STEPS)
    return Budget(probe_s=probe_s, before_s=before_s, steps=steps, fits=fitting >= LEAST_STEPS)


def probe(model: Path, *, rounds: int = 3) -> float:
    """Time a forward and a backward pass over `PROBE_TOKENS`, in seconds: the median of some rounds after a first one.

    Args:
        model: the parent's folder.
        rounds: number of timed rounds.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pat_serve.machine.hardware import serving_dtype

    # pat-train takes this dtype by default.
    parent = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, serving_dtype()))
    torch.manual_seed(0)
    ids_BT = torch.randint(parent.config.vocab_size, (STEP_ROWS, PROBE_TOKENS // STEP_ROWS))
    # LoRA does the same: the gradient reaches the activations of all layers, and next to no weights.
    parent.requires_grad_(False)
    embedded_BTD = parent.get_input_embeddings()(ids_BT).requires_grad_()
    seconds = []
    for _ in range(1 + rounds):
        started_s = time.monotonic()
        parent(inputs_embeds=embedded_BTD, labels=ids_BT).loss.backward()
        seconds.append(time.monotonic() - started_s)
    return median(seconds[1:])
