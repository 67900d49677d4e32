"""The server's life: check model and address, choose settings for this machine, run vLLM, leave nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import psutil

from pat_serve.errors import PortInUse, UsageError
from pat_serve.hardware import available_memory_bytes, serving_dtype
from pat_serve.locate import locate
from pat_serve.server import engine

GIB = 2**30
DEFAULT_KV_CACHE_GIB = 4.0
# A child that has not ended by then is killed.
CHILD_EXIT_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What the command line says.

    Attributes:
        model: a folder or a hub id.
        dtype: auto, or a dtype that vLLM knows.
        max_model_len: tokens of prompt and output together; None takes it from the model.
        kv_cache_gib: memory for keys and values; None chooses by the machine's memory (CPU) or leaves it to vLLM.
        compiled: let torch compile the model at the start (CPU only; vLLM decides elsewhere).
        vllm_flags: handed to vLLM's own parser.
    """

    model: str
    host: str
    port: int
    dtype: str
    max_model_len: int | None
    kv_cache_gib: float | None
    compiled: bool
    vllm_flags: tuple[str, ...] = ()


def run(settings: ServeSettings) -> None:
    """Serve until a signal comes. No child process is left, however it ends.

    Raises:
        MissingModel: no such folder, or no such model on the hub.
        PortInUse: the address is taken or not ours.
        UsageError: a flag for vLLM is wrong.
        EngineError: the engine did not start, or died.
        SystemExit: 0, a signal came while the server was starting.
    """
    # Until the server listens; vLLM's own handlers take over then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    adopt_orphans()
    try:
        # Before vLLM spends half a minute on a model that is not there.
        locate(settings.model, weights=False)
        check_address(settings.host, settings.port)
        prepare_environment(os.environ)
        args = engine.parse_serve_arguments(serve_arguments(settings, on_cpu=engine.is_cpu_backend()))
        if (args.model, args.host, args.port) != (settings.model, settings.host, settings.port):
            raise UsageError(
                "flags after --",
                expected="no --model, --host or --port there",
                found=f"{args.model} on {args.host}:{args.port}",
                fix="Give these to pat-serve itself, before the --.",
            )
        engine.serve(args)
    finally:
        end_children()


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be bound before the engine starts; vLLM binds it for good.

    Raises:
        PortInUse: somebody listens there, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As vLLM's own socket: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUse(
            f"{host}:{port}",
            expected="an address to listen on",
            found=error.strerror or str(error),
            fix="Choose another --port, or stop what listens there.",
        ) from error


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Set what vLLM reads from the environment; what the user has set stays."""
    plugins = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
    if "pat_serve" not in plugins:
        plugins.append("pat_serve")
    environment["VLLM_PLUGINS"] = ",".join(plugins)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("DO_NOT_TRACK", "1")


def serve_arguments(settings: ServeSettings, *, on_cpu: bool) -> list[str]:
    """The command line for vLLM; the user's own flags come last, so that they win."""
    arguments = ["--model", settings.model, "--host", settings.host, "--port", str(settings.port)]
    arguments += ["--dtype", serving_dtype() if on_cpu and settings.dtype == "auto" else settings.dtype]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if settings.kv_cache_gib is not None:
        # The variable counts whole GiB and would win over the flag.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        arguments += ["--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * GIB))]
    elif on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        available_gib = available_memory_bytes() / GIB
        arguments += ["--kv-cache-memory-bytes", str(int(default_kv_cache_gib(available_gib) * GIB))]
    if on_cpu and not settings.compiled:
        # Measured on 2 busy cores, float32: a first start takes 160 s compiled and 48 s eager (a second one 88 s and
        # 41 s: vLLM compiles again when its cached graph does not load), and needs a C++ compiler. Decoding a model of
        # 120 M parameters takes 51 ms a token compiled and 58 ms eager (LOG.md).
        arguments.append("--enforce-eager")
    return arguments + list(settings.vllm_flags)


def default_kv_cache_gib(available_gib: float) -> float:
    """Memory for keys and values where the user names none: 4 GiB, but at most a quarter of what is free.

    vLLM by default takes nine tenths of the machine on a CPU, which a laptop or a shared server does not have.
    """
    return min(DEFAULT_KV_CACHE_GIB, available_gib / 4)


def adopt_orphans() -> None:
    """Have grandchildren whose parent dies become children of this process (Linux; see PR_SET_CHILD_SUBREAPER).

    When the engine's process is killed, its worker would otherwise run on, out of reach and with the model in memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """End every process that descends from this one: a broken start and a dead engine leave some."""
    # A second, impatient signal must not cut this short: it lasts a few seconds at most.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Python's resource tracker ignores SIGTERM on purpose: it frees shared memory once this process has ended.
    children = [child for child in psutil.Process().children(recursive=True) if not _is_resource_tracker(child)]
    for child in children:
        _signal(child, signal.SIGTERM)
    _, alive = psutil.wait_procs(children, timeout=CHILD_EXIT_S)
    for child in alive:
        _signal(child, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=CHILD_EXIT_S)


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _stop(*_: object) -> NoReturn:
    # To be asked to stop is no failure. Not KeyboardInterrupt, which vLLM swallows in places.
    sys.exit(0)
