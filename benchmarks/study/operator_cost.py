"""The cost of each operator of the rank sweep: time of an optimizer step, in turns, and how many numbers it trains."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BATCH, LENGTH = 8, 128


def measure(base: Path, methods: Mapping[str, dict[str, Any]], reference: str, rounds: int = 11) -> dict[str, Any]:
    """Take steps of all methods in turns on one base, so that what slows the machine slows all of them.

    Args:
        base: a checkpoint.
        methods: settings by name.
        reference: the name that times are compared with.
        rounds: steps of each.

    Returns:
        by name: median `step_s`, `relative` to the reference with `low` and `high`, and `trained_parameters`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.training_cost import measure_times
    from pat_serve.server.analysis.statistics import paired_ratio, percentile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    config = model.config
    options = Namespace(
        hidden=config.hidden_size, layers=config.num_hidden_layers, vocab=config.vocab_size, device=device,
        dtype="float32", clock="wall", batch=BATCH, length=LENGTH, accumulation=1, gradient_checkpointing=False,
        rounds=rounds,
    )  # fmt: skip
    times, trained = measure_times(options, model, {name: dict(settings) for name, settings in methods.items()})
    costs = {}
    for name, seconds in times.items():
        ratio = paired_ratio(seconds, times[reference])
        costs[name] = {
            "step_s": percentile(seconds, 50),
            "relative": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "trained_parameters": trained[name],
        }
    return costs
