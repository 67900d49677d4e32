"""Keep token ids without a row in the model's embedding away from an engine, which one such id would end.

vLLM takes every id that its tokenizer or its model knows: in a multimodal model some ids stand for images. The guard
knows the embedding alone. It sits in two places, which all prompts pass whatever their route. Behind the tokenizer it
refuses a stream before its status is out. At the engine it refuses ids that were never a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pat_serve.tokens.vocabulary import Vocabulary


def guard(client: Any, vocabulary: Vocabulary, refusal: Callable[[str], Exception]) -> None:
    """Make an engine's client refuse prompts with an id without a row, and drop such ids from stops and bad words.

    Args:
        client: vLLM's AsyncLLM or LLMEngine; methods of its renderer and its output_processor are wrapped.
        vocabulary: vocabulary of the engine's model.
        refusal: makes the exception from a message.
    """
    renderer, processor = client.renderer, client.output_processor
    process, process_async = renderer.process_for_engine, renderer.process_for_engine_async
    add_request = processor.add_request

    def require(token_ids: Iterable[int] | None) -> None:
        if found := vocabulary.beyond(token_ids or ()):
            raise refusal(
                f"the prompt has {vocabulary.names(found)} without a row in the model's embedding; "
                f"ids of this model are 0 to {vocabulary.rows - 1}"
            )

    def checked(prompt: Mapping[str, Any]) -> Mapping[str, Any]:
        require(prompt.get("prompt_token_ids"))
        return prompt

    def process_and_check(*prompt: Any, **options: Any) -> Any:
        return checked(process(*prompt, **options))

    async def process_and_check_async(*prompt: Any, **options: Any) -> Any:
        return checked(await process_async(*prompt, **options))

    def check_and_add(request: Any, *more: Any, **options: Any) -> Any:
        # The client registers a request before it gives it to the engine.
        require(request.prompt_token_ids)
        if request.sampling_params is not None:
            drop_rowless(request.sampling_params, vocabulary.rows)
        return add_request(request, *more, **options)

    renderer.process_for_engine = process_and_check
    renderer.process_for_engine_async = process_and_check_async
    processor.add_request = check_and_add


def drop_rowless(params: Any, rows: int) -> None:
    """Drop stops and bad words without a row from a request's sampling parameters, since no model can make them.

    A generation config may name end tokens that the embedding does not have. With `min_tokens` vLLM looks up their
    logits, which do not exist.

    Args:
        params: vLLM's SamplingParams, the request's own copy.
        rows: of the embedding.
    """

    def has_row(token_id: int) -> bool:
        return 0 <= token_id < rows

    params._all_stop_token_ids = set(filter(has_row, params._all_stop_token_ids))
    params.stop_token_ids = list(filter(has_row, params.stop_token_ids or ()))
    if params._bad_words_token_ids:
        params._bad_words_token_ids = [word for word in params._bad_words_token_ids if all(map(has_row, word))]
