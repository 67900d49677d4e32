"""The refusals of a speed-up check, before it starts an engine."""

from __future__ import annotations

import math
from dataclasses import replace

from pat_serve.errors import UsageError, want
from pat_serve.machine.hardware import DTYPE_BYTES, free_gpu_bytes
from pat_serve.server.analysis.capacity import Capacity, capacity, memory_for
from pat_serve.server.analysis.verdict import MARGIN_BOUND, MIN_ROUNDS
from pat_serve.server.bench.model_source import ModelSource
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.memory import MAX_STEP_TOKENS, engine_memory_bytes, free_memory_bytes, require_memory
from pat_serve.server.engine.workers.probe import SIZES

# Where whole models do not fit, so many layers of each give their lines. Four layers apart, a layer's time stands well
# above the noise; a deeper cut would take longer than it adds.
SHALLOW, DEEP = 2, 6


def check_settings(settings: SpeedupSettings) -> None:
    """Refuse numbers that cannot be measured.

    Raises:
        UsageError: naming the flag.
    """
    claim_fine = math.isfinite(settings.claim) and settings.claim > 0
    want("--claim", claim_fine, "a ratio above 0", settings.claim, "Try --claim 1.33.")
    expected = f"a share from 0 to below {MARGIN_BOUND:g}"
    want("--margin", 0 <= settings.margin < MARGIN_BOUND, expected, settings.margin, "Try --margin 0.02 for 2 %.")
    batch_flag = "--grid" if settings.grid else "--batch-size"
    for size in settings.batch_sizes or (settings.batch_size,):
        want("--batch-size", size >= 1, f"1 to {MAX_STEP_TOKENS - 1}", size, "Try --batch-size 1.")
    want("--prompt-tokens", settings.prompt_tokens >= 1, "at least 1", settings.prompt_tokens, "Try 128.")
    for cell in settings.cells:
        size = cell.batch_size
        want(batch_flag, size < MAX_STEP_TOKENS, f"1 to {MAX_STEP_TOKENS - 1} requests", size, "Give fewer.")
    one_size = len(settings.cells) == 1 or not settings.fixed_memory
    want("--fixed-memory", one_size, "one batch size", "several", "Give --batch-size one number, the baseline's.")
    _check_named(settings)
    if settings.precision is not None:
        fine = math.isfinite(settings.precision) and 0 < settings.precision < 1
        want("--precision", fine, "a share between 0 and 1", settings.precision, "Try --precision 0.02.")
        enough = settings.max_rounds >= settings.rounds
        want("--max-rounds", enough, f"at least --rounds, {settings.rounds}", settings.max_rounds, "Raise it.")
        want("--max-minutes", settings.max_seconds > 0, "above 0", settings.max_seconds / 60, "Try --max-minutes 15.")
    if settings.depths:
        want("--layers", not settings.fixed_memory, "one depth beside --fixed-memory", "several", "Give one number.")
        want("--layers", not settings.judge_average, "one depth beside --paper", "several", "Give one number.")
    want("--seed", 0 <= settings.seed < 2**32, "0 to 4294967295", settings.seed, "Try --seed 0.")
    want("--rounds", settings.rounds >= MIN_ROUNDS, f"at least {MIN_ROUNDS}", settings.rounds, "Try --rounds 12.")
    want("--regime", bool(settings.regimes), "prefill, decode or both", "none", "Leave --regime out for both.")
    if Regime.DECODE in settings.regimes:
        least, cell = max(
            ((least_output_tokens(one.batch_size, one.prompt_tokens), one) for one in settings.cells),
            key=lambda found: found[0],
        )
        want(
            "--output-tokens",
            settings.output_tokens >= least,
            f"at least {least} to time decode of {cell.batch_size} prompts of {cell.prompt_tokens} tokens",
            settings.output_tokens,
            "Ask for more output tokens, or for --regime prefill alone.",
        )


def _check_named(settings: SpeedupSettings) -> None:
    """Refuse a claim about regimes that are not measured.

    Raises:
        UsageError: the claim names one, or names any beside the average.
    """
    want("--claim-at", not (settings.named and settings.judge_average), "no --paper", "both", "Leave one out.")
    for one in settings.named:
        measured = one.cell in settings.cells and one.regime in (None, *settings.regimes)
        cells = ", ".join(map(str, settings.cells))
        want("--claim-at", measured, f"regimes that are measured: {cells}", str(one), "Add it to --grid and --regime.")


def least_output_tokens(batch_size: int, prompt_tokens: int) -> int:
    """The fewest output tokens with which the whole batch decodes together for a step at least.

    A batch beyond one step's tokens is prefilled in pieces. The requests that already decode take a token each of a
    step's budget, so a piece brings at least MAX_STEP_TOKENS - batch_size tokens; the first request has a token more
    after each.
    """
    tokens = batch_size * prompt_tokens
    pieces = 1 if tokens <= MAX_STEP_TOKENS else math.ceil(tokens / (MAX_STEP_TOKENS - batch_size))
    return pieces + 1


def check_pair(baseline: ModelSource, candidate: ModelSource, settings: SpeedupSettings) -> None:
    """Refuse two models that cannot be given the same work.

    Raises:
        UsageError: different vocabularies, or a context beyond what one of them was made for.
    """
    if baseline.shape.vocab != candidate.shape.vocab:
        raise UsageError(
            f"--candidate {candidate.name}",
            expected=f"the baseline's vocabulary of {baseline.shape.vocab}, so that the same token ids fit both",
            found=f"a vocab_size of {candidate.shape.vocab}",
            fix="Compare a model with one that was pruned from it.",
        )
    for source in (baseline, candidate):
        check_context(source, settings.tokens_per_request)


def check_context(source: ModelSource, tokens: int) -> None:
    """Refuse requests that are longer than a model's context.

    Raises:
        UsageError: the requests are longer.
    """
    limit = source.config.get("max_position_embeddings")
    if isinstance(limit, int) and tokens > limit:
        raise UsageError(
            "--prompt-tokens and --output-tokens",
            expected=f"at most {limit} together, the context of {source.name}",
            found=str(tokens),
            fix="Ask for fewer tokens.",
        )


def candidate_settings(
    baseline: ModelSource, candidate: ModelSource, settings: SpeedupSettings, dtype: str
) -> SpeedupSettings:
    """The candidate's settings: the baseline's batch, or with fixed memory as many requests as fit.

    Raises:
        UsageError: with fixed memory, a batch beyond a step's tokens, or a candidate whose weights do not fit.
    """
    if not settings.fixed_memory:
        return settings
    fits = fitting_requests(baseline, candidate, settings, dtype).requests
    if not 1 <= fits < MAX_STEP_TOKENS:
        raise UsageError(
            "--fixed-memory",
            expected=f"1 to {MAX_STEP_TOKENS - 1} requests of {candidate.name} in the memory of {baseline.name}",
            found=str(fits),
            fix="Change --batch-size, which gives the memory, or leave --fixed-memory out.",
        )
    return settings.with_batch(fits)


def fitting_requests(baseline: ModelSource, source: ModelSource, settings: SpeedupSettings, dtype: str) -> Capacity:
    """The capacity of a model in the memory that the baseline's weights and its largest batch take."""
    value_bytes, tokens = DTYPE_BYTES[dtype], settings.tokens_per_request
    # The longest requests, in the batch with the most tokens.
    requests = max(settings.full_batches, key=lambda one: one.requests * one.tokens_per_request).requests
    budget = memory_for(baseline.shape, requests=requests, tokens=tokens, dtype_bytes=value_bytes)
    return capacity(source.shape, memory_bytes=budget, tokens=tokens, dtype_bytes=value_bytes)


def check_memory(baseline: ModelSource, candidate: ModelSource, settings: SpeedupSettings, dtype: str) -> None:
    """Refuse to start two engines that the machine cannot hold: a machine that swaps would measure its disk.

    Raises:
        EngineError: with both amounts.
    """
    needed = _pair_memory_bytes(baseline, candidate, settings, dtype)
    way_out = (
        "Cut both models with --layers 2,6 --load-format dummy (the verdict is on the whole ones), or free memory."
    )
    require_memory("two engines side by side", needed, dtype=dtype, fix=way_out)


def depths_that_fit(
    baseline: ModelSource, candidate: ModelSource, settings: SpeedupSettings, dtype: str
) -> tuple[int, ...]:
    """Two depths at which both models fit beside each other, the deeper one as deep as is worth its time.

    Args:
        baseline: the whole model.
        candidate: the other whole model.
        settings: give batch and lengths.
        dtype: of the weights.

    Returns:
        no depths where the whole models fit, or where no deeper cut than the shallow one does.
    """
    free_bytes = free_memory_bytes()[0]

    def fit(layers: int | None) -> bool:
        pair = [one if layers is None else cut_source(one, layers) for one in (baseline, candidate)]
        return _pair_memory_bytes(pair[0], pair[1], settings, dtype) <= free_bytes

    deepest = min(baseline.shape.layers, candidate.shape.layers) - 1
    if fit(None):
        return ()
    return next(((SHALLOW, deep) for deep in range(min(DEEP, deepest), SHALLOW, -1) if fit(deep)), ())


def cut_source(source: ModelSource, layers: int) -> ModelSource:
    """A model as it would be with so many layers; nothing is written."""
    return replace(source, shape=replace(source.shape, layers=layers))


def _pair_memory_bytes(baseline: ModelSource, candidate: ModelSource, settings: SpeedupSettings, dtype: str) -> int:
    others = candidate_settings(baseline, candidate, settings, dtype)
    probe_bytes = SIZES["cpu" if free_gpu_bytes() is None else "cuda"].weight_bytes if settings.roofline else 0
    return (
        max(engine_memory_bytes(baseline.shape, batch, dtype) for batch in settings.full_batches)
        + max(engine_memory_bytes(candidate.shape, batch, dtype) for batch in others.full_batches)
        + probe_bytes
    )
