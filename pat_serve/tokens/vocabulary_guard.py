"""Token ids without a row in the model's embedding, kept away from an engine, which one of them would end.

vLLM takes an id that its tokenizer or its model knows, whichever knows more: of a multimodal model some ids stand for
images. The guard knows the embedding alone. It sits where all prompts pass, whatever their route: behind the tokenizer,
so that a stream too is refused before its status is out, and at the engine, for ids that were never a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pat_serve.tokens.vocabulary import Vocabulary


def guard(client: Any, vocabulary: Vocabulary, refusal: Callable[[str], Exception]) -> None:
    """Have an engine's client refuse prompts with an id without a row, and drop such ids from stops and bad words.

    Args:
        client: vLLM's AsyncLLM or LLMEngine; methods of its renderer and its output_processor are wrapped.
        vocabulary: of its model.
        refusal: makes what is raised, of its message.
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
    """Take stops and bad words that no model of so many rows can make out of a request's sampling parameters.

    A generation config may name end tokens that an embedding does not have; with `min_tokens` vLLM looks their logits
    up, which do not exist.

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
