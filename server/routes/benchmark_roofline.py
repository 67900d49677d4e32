"""The least work of a benchmark's batch and context, counted from the configs of the loaded models."""

from __future__ import annotations

from pat_serve.errors import PatServeError
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.server.engine.online import Engine
from pat_serve.server.routes.benchmark_schemas import DecodeRoofline, PrefillRoofline, RooflineBody
from pat_serve.shapes.roofline import decode_ceiling, prefill_ceiling, prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes


def roofline(
    engine: Engine,
    baseline: Engine | None,
    *,
    batch_size: int,
    prompt_tokens: int,
    output_tokens: int,
    prefill_s: float | None = None,
    decode_step_s: float | None = None,
) -> RooflineBody | None:
    """Count the work and the ceilings of a benchmark; None for a model whose bytes cannot be counted from its config.

    Args:
        engine: the engine that was measured.
        baseline: the dense parent's engine, if there is one.
        batch_size: requests at once.
        prompt_tokens: of each request.
        output_tokens: of each request.
        prefill_s: measured time to the batch's first tokens.
        decode_step_s: measured time per output token.
    """
    shape = countable_shape(engine)
    if shape is None:
        return None
    value_bytes = DTYPE_BYTES[engine.dtype]
    # The first decode step finds the prompt and one token in the cache, the last one all but one token.
    context = prompt_tokens + output_tokens / 2
    flops = prefill_flops(shape, batch_size=batch_size, prompt_tokens=prompt_tokens)
    step_bytes = decode_bytes(shape, batch_size=batch_size, context_tokens=context, dtype_bytes=value_bytes)
    prefill_limit = decode_limit = None
    if baseline is not None and (theirs := countable_shape(baseline)) is not None:
        prefill_limit = prefill_ceiling(theirs, shape, batch_size=batch_size, prompt_tokens=prompt_tokens)
        decode_limit = decode_ceiling(
            theirs, shape, batch_size=batch_size, context_tokens=context, dtype_bytes=value_bytes
        )
    return RooflineBody(
        batch_size=batch_size,
        dtype=engine.dtype,
        prefill=PrefillRoofline(
            prompt_tokens=prompt_tokens,
            flops=flops,
            achieved_flops_per_s=flops / prefill_s if prefill_s else None,
            speedup_ceiling=prefill_limit,
        ),
        decode=DecodeRoofline(
            context_tokens=context,
            bytes_per_step=step_bytes,
            achieved_bytes_per_s=step_bytes / decode_step_s if decode_step_s else None,
            speedup_ceiling=decode_limit,
        ),
    )


def countable_shape(engine: Engine) -> ModelSizes | None:
    """The sizes that decide what a step costs; None where not all weights have the model's dtype."""
    if engine.quantized or engine.dtype not in DTYPE_BYTES:
        return None
    try:
        return ModelSizes.of(engine.config, source=engine.model_name)
    except PatServeError:
        return None
