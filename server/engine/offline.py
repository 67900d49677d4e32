"""A vLLM engine that runs in the caller's own process, and what `workers/` asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


def offline_llm(model: str, **options: Any) -> Any:
    """A vllm.LLM. It runs in this process where the environment has VLLM_ENABLE_V1_MULTIPROCESSING=0.

    Args:
        model: folder or hub id.
        options: those of vllm.LLM.
    """
    from vllm import LLM

    return LLM(model, **options)


def own_products(llm: Any) -> list[tuple[int, int, Callable[[Any], Any]]]:
    """The matrices of an `offline_llm` that runs in this process: columns, weights, and how it multiplies rows by each.

    Those of the layers and the output head, in the order of the model; none of a quantized model, whose matrices take
    other bytes than its number format's.
    """
    if llm.llm_engine.model_config.quantization is not None:
        return []
    from vllm.model_executor.layers.linear import LinearBase

    def collect(model: Any) -> list[tuple[int, int, Callable[[Any], Any]]]:
        found: list[tuple[int, int, Callable[[Any], Any]]] = [
            (one.input_size, one.input_size * one.output_size, partial(one.quant_method.apply, one))
            for one in model.modules()
            if isinstance(one, LinearBase)
        ]
        head = getattr(model, "lm_head", None)
        if head is not None:
            size = head.embedding_dim
            found.append((size, size * head.num_embeddings, partial(head.quant_method.apply, head)))
        return found

    collected: list[tuple[int, int, Callable[[Any], Any]]] = llm.apply_model(collect)[0]
    return collected


def submit(
    llm: Any, request_id: str, prompt: Sequence[int], *, output_tokens: int, prompt_logprobs: int | None = None
) -> None:
    """Queue one request of a `offline_llm`: greedy, of exactly so many tokens, which are not turned into text.

    Not through LLM.enqueue, which reports a request only when it has finished: its steps would stay unseen.
    """
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=prompt_logprobs,
    )
    llm.llm_engine.add_request(request_id, tokens_input(list(prompt)), sampling)
