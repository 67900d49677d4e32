"""The process that stays behind, with a child that does what a test wants."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

SERVER = """
    import signal, sys, time
    from pat_serve.server.start.supervisor import supervise

    # Whatever the tests' own process was started with.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)
    supervise(grace_s={grace_s})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("up", flush=True)
    time.sleep(60)
"""


def start(*, ignored: bool = False, grace_s: float = 1.0) -> subprocess.Popen[str]:
    code = textwrap.dedent(SERVER).format(ignored=ignored, grace_s=grace_s)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_the_end_of_its_terminal_stops_a_server() -> None:
    with start() as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 7


def test_nohup_keeps_a_server_at_the_end_of_its_terminal() -> None:
    with start(ignored=True) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
