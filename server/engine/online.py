"""The running engine of a server: vLLM's asynchronous client, behind the few operations that the routes need."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any
from uuid import uuid4

from pat_serve.server.engine.errors import (
    EngineDead,
    EngineFault,
    EngineOverloaded,
    GenerationFailed,
    RequestRefused,
)
from pat_serve.server.engine.failures import expect_its_end
from pat_serve.server.engine.generation import EngineTimes, Piece, Sampling
from pat_serve.server.engine.patches import guard_vocabulary, watch_outputs

logger = logging.getLogger(__name__)


class Engine:
    """The running engine of a server, as the routes see it.

    Args:
        client: vLLM's AsyncLLM.
        model_name: the name under which the OpenAI routes serve it.
        chat: how conversations become prompts, from `chat_settings`.
    """

    def __init__(self, client: Any, model_name: str, chat: Any) -> None:
        self._client = client
        self._chat = chat
        self.model_name = model_name
        self.max_model_len: int = client.model_config.max_model_len
        self.vocab_size: int = client.model_config.get_vocab_size()
        self.max_num_seqs: int = client.vllm_config.scheduler_config.max_num_seqs
        self.hidden_size: int = client.model_config.get_hidden_size()
        self._watch = watch_outputs(client.output_processor)
        self.vocabulary = guard_vocabulary(client, self.vocab_size)
        self.max_step_tokens: int = client.vllm_config.scheduler_config.max_num_batched_tokens
        self.config: dict[str, Any] = client.model_config.hf_text_config.to_dict()
        self.dtype = str(client.model_config.dtype).removeprefix("torch.")
        self.quantized = client.model_config.quantization is not None
        self.eager = bool(client.model_config.enforce_eager)
        # Makes the fault that is raised for requests to this engine once it is dead.
        self.death: Callable[[], EngineFault] = EngineDead
        self._renders: bool | None = None
        # The shutdown that follows a signal calls this once, in a thread of its own, before the engine stops. The call
        # may block.
        self.before_stop: Callable[[], None] = lambda: None

    @property
    def last_token_s(self) -> float | None:
        """The time of the engine's last token, whoever asked for it, on the monotonic clock; None before the first."""
        return self._watch.last_token_s

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended or reported a fatal error."""
        return bool(self._client.errored)

    def abort_all(self) -> None:
        """End all requests of the engine, on the event loop.

        vLLM stops reading an engine's output before the engine has said that its requests have ended.
        """
        requests = self._client.output_processor
        requests.abort_requests(list(requests.request_states), internal=True)

    def stop(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the engine's requests and its processes, from another thread than the loop's."""
        expect_its_end()
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(self.abort_all)
        self._client.shutdown(timeout=0)

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, whole and with the special tokens that the tokenizer adds; made off the event loop."""
        from vllm.renderers import TokenizeParams

        # Without a bound vLLM's tokenizer does not cut the text, so that an error can give the prompt's true length.
        params = TokenizeParams(max_total_tokens=None)
        [prompt] = await self._client.renderer.tokenize_prompts_async([{"prompt": text}], params)
        return list(prompt["prompt_token_ids"])

    async def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation as the model's chat template writes it, up to where its answer begins.

        Args:
            messages: `role` and `content` of each turn.

        Raises:
            RequestRefused: the model has no chat template, or a broken one, or it refuses these turns.
        """
        from jinja2 import TemplateError
        from vllm.exceptions import VLLMClientError
        from vllm.renderers import TokenizeParams
        from vllm.renderers.chat_utils import ChatTemplateResolutionError
        from vllm.utils.mistral import is_mistral_tokenizer

        renderer = self._client.renderer
        # The template writes text, because the tokenizer would cut ids at the model's length. Mistral's own template
        # writes ids alone.
        chat = self._chat.with_defaults({"tokenize": is_mistral_tokenizer(renderer.tokenizer)})
        try:
            _, text = await renderer.render_messages_async([dict(message) for message in messages], chat)
        except ChatTemplateResolutionError as error:
            told = "messages: this model has no chat template; send prompt, or start the server with -- --chat-template"
            raise RequestRefused(told, "messages") from error
        except VLLMClientError as error:
            raise RequestRefused(f"messages: the chat template refuses them: {error}", "messages") from error
        except TemplateError as error:
            # Raised where the template is read and not where it runs.
            told = f"messages: the chat template is broken: {error}; send prompt, or give one with -- --chat-template"
            raise RequestRefused(told, "messages") from error
        # The template writes the special tokens itself.
        params = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        [prompt] = await renderer.tokenize_prompts_async([text], params)
        return list(prompt["prompt_token_ids"])

    async def has_chat_template(self) -> bool:
        """Whether a conversation can be rendered. The renderer is asked once."""
        if self._renders is None:
            try:
                await self.render([{"role": "user", "content": "a"}])
                self._renders = True
            except RequestRefused:
                self._renders = False
        return self._renders

    async def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece]:
        """Generate; closing the generator or cancelling its consumer aborts the request in the engine.

        Raises:
            RequestRefused: the engine can never serve the request.
            EngineOverloaded: the engine's queue is full.
            EngineFault: the engine is dead; `death` makes the fault.
            GenerationFailed: the engine failed on this request.
        """
        from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        outputs = self._client.generate(
            tokens_input(list(prompt_token_ids)), _sampling_params(sampling), f"pat-{uuid4().hex}"
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    [completion] = output.outputs
                    yield Piece(
                        text=completion.text,
                        token_ids=tuple(completion.token_ids),
                        finish_reason=completion.finish_reason,
                        engine_times=_engine_times(output.metrics) if output.finished else None,
                    )
        except VLLMClientError as error:
            raise RequestRefused(str(error), getattr(error, "parameter", None)) from error
        except GracefulHTTPError as error:
            raise EngineOverloaded(str(error)) from error
        except EngineDeadError as error:
            raise self.death() from error
        except VLLMError as error:
            logger.exception("a generation failed")
            raise GenerationFailed from error


def _sampling_params(sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        detokenize=sampling.detokenize,
        skip_reading_prefix_cache=not sampling.read_prefix_cache,
        # Deltas are asked for also where the whole text is wanted, so that our own clock sees the moment of the first
        # token.
        output_kind=RequestOutputKind.DELTA,
    )


def _engine_times(metrics: Any) -> EngineTimes | None:
    # There are no metrics with --disable-log-stats, and a request that ended before its first token has no such
    # timestamps.
    if metrics is None or not metrics.first_token_ts:
        return None
    return EngineTimes(
        queue_s=metrics.scheduled_ts - metrics.queued_ts, decode_s=metrics.last_token_ts - metrics.first_token_ts
    )


def chat_settings(args: Namespace) -> Any:
    """vLLM's parameters for rendering a conversation, from the same flags as its own chat route."""
    from vllm.renderers import ChatParams
    from vllm.renderers.chat_utils import load_chat_template

    kwargs = {"add_generation_prompt": True, "continue_final_message": False}
    return ChatParams(
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs=(args.default_chat_template_kwargs or {}) | kwargs,
    )
