"""A vLLM engine that runs in the caller's own process, and the questions that `workers/` has for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


def offline_llm(model: str, **options: Any) -> Any:
    """Make a vllm.LLM.

    The engine runs in this process where the environment has VLLM_ENABLE_V1_MULTIPROCESSING=0.

    Args:
        model: folder or hub id.
        options: further options of vllm.LLM.
    """
    from vllm import LLM

    return LLM(model, **options)


def own_products(llm: Any) -> list[tuple[int, int, Callable[[Any], Any]]]:
    """The matrices of an `offline_llm` that runs in this process, with the kernels that multiply by them.

    Each matrix is given as its columns, its number of weights, and the function that multiplies rows by it. The
    matrices are those of the layers and of the output head, in the order of the model. A quantized model gives none,
    because its matrices take other bytes than its number format's.
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
    """Queue one request of an `offline_llm`: greedy, of exactly so many tokens, which are not turned into text.

    LLM.enqueue would not do: it reports a request only when it has finished, and its steps would stay unseen.
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
