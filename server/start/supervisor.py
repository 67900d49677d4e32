"""The process that a user starts: it watches the server, and leaves no process behind.

The server runs in a child with a process group of its own. Ctrl-C in a terminal reaches all processes of a group, and
an engine that gets it dies before the requests under way have finished. Here Ctrl-C reaches this process alone, which
tells the server. When this process is killed, the kernel tells the server. When the server is killed, this process
adopts the orphans and ends them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil

# A child that has not ended by then is killed.
CHILD_EXIT_S = 5.0
# Seconds that an orderly end may take beyond the grace of the requests, and that all of it may take after a second
# signal.
_END_S = 30
_HURRIED_END_S = 10
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervise(*, grace_s: float) -> None:
    """Go on in a child process, the server; the calling process stays behind and watches it.

    Args:
        grace_s: time that requests under way may take once a signal has come.

    Raises:
        SystemExit: in the calling process, with the server's exit code (128 + N when signal N killed it).
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        sys.exit(_watch(child, grace_s))
    os.setpgid(0, 0)
    # A group in the background may write to its terminal, even where `stty tostop` says otherwise.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    end_with_parent()
    if os.getppid() != parent:
        sys.exit(1)


def _watch(server: int, grace_s: float) -> int:
    adopt_orphans()
    received = 0

    def pass_on(number: int, _: Any) -> None:
        nonlocal received
        received += 1
        signal.alarm(int(grace_s) + _END_S if received == 1 else _HURRIED_END_S)
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def give_up(*_: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A signal that our parent ignores is left ignored: this is how nohup keeps a server at the end of its terminal.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, give_up)
    status = None
    while status is None:
        ended, code = os.waitpid(-1, 0)
        # Any other process that ends is an orphan that was adopted.
        status = os.waitstatus_to_exitcode(code) if ended == server else None
    signal.alarm(0)
    end_children()
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the thread that started it ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Have grandchildren whose parent dies become children of this process (Linux; see PR_SET_CHILD_SUBREAPER).

    When the engine's process is killed, its worker would otherwise run on, out of reach and with the model in memory.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


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


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
