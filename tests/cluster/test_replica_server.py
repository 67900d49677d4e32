"""The server of a replica: started, quoted, given up, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pat_serve.errors import EngineError
from pat_serve.server.cluster.replica_server import ReplicaServer
from pat_serve.server.cluster.settings import ReplicaSettings


@pytest.mark.parametrize(
    ("flags", "told"),
    [("--surprise", "No such option: --surprise"), ("--log-format x", "expected text, json, found x")],
)
def test_a_server_that_refuses_to_start_is_quoted(model: Path, flags: str, told: str) -> None:
    async def start() -> None:
        server = ReplicaServer(ReplicaSettings(model=str(model), flags=flags))
        assert not server.ended.is_set()
        await server.until_ready()

    with pytest.raises(EngineError, match="ended with 2") as caught:
        asyncio.run(start())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_never_ready_is_given_up_and_stopped(model: Path) -> None:
    async def start() -> None:
        server = ReplicaServer(ReplicaSettings(model=str(model), start_timeout_s=0.01))
        try:
            with pytest.raises(EngineError, match=r"within 0\.01 s"):
                await server.until_ready()
            with pytest.raises(EngineError, match="no answer"):
                await server.check()
        finally:
            await server.stop()
        assert server.ended.is_set()

    asyncio.run(start())


def test_a_child_is_told_when_its_parent_is_killed(tmp_path: Path) -> None:
    ready, mark = tmp_path / "ready", tmp_path / "told"
    child = (
        f"import signal, time; signal.signal(15, lambda *_: open({str(mark)!r}, 'w').close() or exit()); "
        f"open({str(ready)!r}, 'w').close(); time.sleep(600)"
    )
    start = (
        "import os, subprocess, sys, time\n"
        "module = ['-m', 'pat_serve.server.cluster.child', str(os.getpid())]\n"
        f"child = subprocess.Popen([sys.executable, *module, sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        process = psutil.Process(int(parent.stdout.readline()))
        deadline_s = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        os.kill(parent.pid, signal.SIGKILL)
    psutil.wait_procs([process], timeout=120)
    assert not process.is_running()
    assert mark.exists()
