"""The life of a server: check model and address, run vLLM, leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import sys
from argparse import Namespace
from collections.abc import MutableMapping
from dataclasses import replace
from importlib.metadata import entry_points
from ipaddress import ip_address
from typing import Any, NoReturn

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.errors import EngineError, PortInUse, UsageError
from pat_serve.server.engine.baseline import check_comparable, check_memory
from pat_serve.server.engine.serve import is_cpu_backend, parse_serve_arguments, serve
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.keys import KeyRing, collect_keys
from pat_serve.server.http.limits import MAX_STOPS
from pat_serve.server.http.policy import Policy
from pat_serve.server.start.draft_check import check_draft
from pat_serve.server.start.handover import Handover
from pat_serve.server.start.settings import GIB, ServeSettings, serve_arguments, with_stock_folders
from pat_serve.server.start.supervisor import adopt_orphans, end_children, supervise
from pat_serve.server.start.trusted_model import check_trusted
from pat_serve.server.start.whole_model import check_whole_models
from pat_serve.shapes.cpu_kernels import check_cpu_kernels

# vLLM closes an idle connection after 5 s, as httpx and so the openai client do: a client that uses the connection in
# that instant loses the race. Load balancers keep idle connections for a minute.
KEEP_ALIVE_S = 75
# Formats that open pickles if they find nothing else.
_UNSAFE_LOAD_FORMATS = ("auto", "hf", "pt", "npcache")


def run(settings: ServeSettings) -> None:
    """Serve until a signal comes. No child process is left, however it ends.

    The calling process becomes the server's supervisor and ends with its exit code.

    Raises:
        MissingModel: no such folder, no such model on the hub, or one without weights or a tokenizer.
        BrokenCheckpoint: the weights or the tokenizer are damaged.
        UnsupportedModel: the model brings pickles or code.
        PortInUse: the address is taken or not ours.
        UsageError: a flag, a key or a certificate is wrong.
        EngineError: the engine did not start, or died.
        SystemExit: the calling process always ends so; the server does, with 0, when a signal comes while it starts.
    """
    supervise(grace_s=settings.policy.shutdown_timeout_s)
    # These handlers hold until the server listens; vLLM's own take over then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    adopt_orphans()
    try:
        keys = collect_keys(settings.api_keys, environment=os.environ, file=settings.api_key_file)
        settings = with_stock_folders(settings)
        # These checks come before vLLM spends half a minute on a model that is not there.
        for model in filter(None, (settings.model, settings.baseline)):
            check_trusted(model, locate(model, weights=False))
        if settings.baseline is not None:
            check_comparable(settings.model, settings.baseline)
        if settings.draft is not None:
            check_draft(settings.model, settings.draft)
        check_address(settings.host, settings.port)
        prepare_environment(os.environ)
        check_plugin()
        args = parse_serve_arguments(serve_arguments(settings, on_cpu=is_cpu_backend()))
        check_flags(args, settings)
        if is_cpu_backend():
            for model in filter(None, (settings.model, settings.baseline, settings.draft)):
                check_cpu_kernels(read_config(locate(model, weights=False)), model, args.dtype)
        check_whole_models(args, settings.model, baseline=settings.baseline, draft=settings.draft)
        if settings.baseline is not None and is_cpu_backend():
            # On an accelerator vLLM itself refuses an engine for which there is no room.
            kv_cache_bytes = args.kv_cache_memory_bytes or int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) * GIB
            check_memory(settings.model, settings.baseline, dtype=args.dtype, kv_cache_bytes=kv_cache_bytes)
        check_certificate(args.ssl_certfile, args.ssl_keyfile)
        # vLLM would guard some routes only, and would keep the keys in plain text.
        more = collect_keys([f"vllm-{index}={key}" for index, key in enumerate(args.api_key or [], 1)], environment={})
        args.api_key = None
        policy = replace(settings.policy, keys=KeyRing(keys=keys.keys + more.keys))
        warn_if_open(settings.host, policy)
        if args.shutdown_timeout:
            policy = replace(policy, shutdown_timeout_s=float(args.shutdown_timeout))
            args.shutdown_timeout = 0
        handover = Handover(policy=policy, log_format=settings.log_format, baseline=settings.baseline)
        handover.give(args)
        serve(args, handover.life, uvicorn_options(handover))
    finally:
        end_children()


def check_plugin() -> None:
    """Refuse to start where vLLM would not find or not load our plugin, and serve without it.

    Raises:
        EngineError: the package is not installed as it should be.
    """
    found = entry_points(group="vllm.endpoint_plugins", name="pat_serve")
    for entry in found:
        entry.load()
    if not found:
        raise EngineError(
            "pat-serve",
            expected="its entry point vllm.endpoint_plugins",
            found="none",
            fix="Install the package (pip install pat-serve); its source folder alone is not enough.",
        )


def uvicorn_options(handover: Handover) -> dict[str, Any]:
    """The options of uvicorn beside those that vLLM sets."""
    from pat_serve.server.http.protocol import CONNECTIONS_END_S, bounded_protocol

    def refused(error: HttpError) -> None:
        assert handover.observation is not None, "no connection is taken before"
        handover.observation.refused(error)

    protocol = bounded_protocol(handover.policy, guarded=lambda: handover.guarded, refused=refused)
    return {
        "http": protocol,
        # No route of ours is a WebSocket.
        "ws": "none",
        "server_header": False,
        # The protocol has ended all connections by then; uvicorn would do so with a traceback.
        "timeout_graceful_shutdown": CONNECTIONS_END_S + 1,
    }


def check_flags(args: Namespace, settings: ServeSettings) -> None:
    """Refuse flags for vLLM that would be ignored here, or would undo what this server promises.

    Raises:
        UsageError: there is such a flag.
    """
    wrong = {
        "--model, --host or --port": (args.model, args.host, args.port)
        != (settings.model, settings.host, settings.port),
        "--headless": args.headless,
        "--api-server-count": args.api_server_count not in (None, 1),
        "--uds": args.uds,
        "--grpc-port": args.grpc_port,
        "--trust-remote-code": args.trust_remote_code,
        "draft_load_config": "draft_load_config" in (args.speculative_config or {}),
        f"--load-format {args.load_format}": args.load_format in _UNSAFE_LOAD_FORMATS,
    }
    for flag, given in wrong.items():
        if given:
            raise UsageError(
                "flags after --",
                expected=f"no {flag} there",
                found="it",
                fix="Give --model, --host and --port to pat-serve itself, before the --; leave the others out.",
            )


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Refuse a TLS certificate or key that cannot be used before the engine starts.

    Raises:
        UsageError: a file is missing or unreadable, or they do not belong together.
    """
    if certificate is None and key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate or "", key)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key}",
            expected="a certificate and its private key, as PEM files",
            found=str(error) or type(error).__name__,
            fix="Check both paths, and that the key is the certificate's.",
        ) from error


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be bound before the engine starts; vLLM binds it for good.

    Raises:
        PortInUse: somebody listens there, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # vLLM's own socket has the same option: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUse(
            f"{host}:{port}",
            expected="an address to listen on",
            found=error.strerror or str(error),
            fix="Choose another --port, or stop what listens there.",
        ) from error


def warn_if_open(host: str, policy: Policy) -> None:
    """Warn when other machines may use the server without a key. An image can have no other default."""
    addresses = {str(address[0]).split("%")[0] for *_, address in socket.getaddrinfo(host, None)}
    if not policy.keys.keys and not all(ip_address(address).is_loopback for address in addresses):
        sys.stderr.write(
            f"pat-serve: warning: --host {host} without API keys: whoever reaches this port may use the server. "
            "Give keys with --api-key-file FILE or PAT_SERVE_API_KEYS.\n"
        )


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Set the variables that vLLM reads; a variable that the user has set stays."""
    plugins = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
    if "pat_serve" not in plugins:
        plugins.append("pat_serve")
    environment["VLLM_PLUGINS"] = ",".join(plugins)
    # vLLM allows four by default, and its refusal speaks of a type.
    environment.setdefault("VLLM_MAX_STOP_STRINGS", str(MAX_STOPS))
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("DO_NOT_TRACK", "1")
    environment.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEP_ALIVE_S))


def _stop(*_: object) -> NoReturn:
    # A server that is asked to stop has not failed. KeyboardInterrupt would not do, because vLLM swallows it in places.
    sys.exit(0)
