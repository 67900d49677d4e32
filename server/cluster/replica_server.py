"""The pat-serve process behind one replica: started, watched, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from pat_serve.errors import EngineError
from pat_serve.server.cluster.relay import Relay
from pat_serve.server.cluster.settings import ReplicaSettings, server_command

# Ray Serve logs to files by this name.
logger = logging.getLogger("ray.serve")

HOST = "127.0.0.1"
# Readiness itself gives the engine 10 s for a token.
_READY_S = 15.0
_POLL_S = 0.25
_BOX = " \t\n│╭╮╰╯─"


class ReplicaServer:
    """A pat-serve process of its own on a free port of this machine, which ends with this process.

    Make it in the thread of an event loop that lasts, because the kernel ends the server with the thread that started
    it.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        port = _free_port()
        self.relay = Relay(f"http://{HOST}:{port}")
        self.ended = asyncio.Event()
        self._settings = settings
        self._process = subprocess.Popen(
            server_command(settings, port=port, parent=os.getpid()),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._last_lines: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()

    async def until_ready(self) -> None:
        """Wait for the engine's first token.

        Raises:
            EngineError: the server ended, and the error has its last words; or the server took too long.
        """
        deadline_s = time.monotonic() + self._settings.start_timeout_s
        while not await self.relay.ready(_READY_S):
            if self.ended.is_set():
                self._reader.join(1)
                raise EngineError(
                    "pat-serve of this replica",
                    expected="a server that is ready",
                    found=f"that it ended with {self._process.returncode}: {self._last_words()}",
                    fix="Mend what it says; `pat-serve` with the same model and flags says it without Ray.",
                )
            if time.monotonic() > deadline_s:
                raise EngineError(
                    "pat-serve of this replica",
                    expected=f"a server that is ready within {self._settings.start_timeout_s:g} s",
                    found=f"none; its last words: {self._last_words()}",
                    fix="Give it more time (start_timeout_s), or look into the replica's log.",
                )
            await asyncio.sleep(_POLL_S)

    async def check(self) -> None:
        """Ask whether the engine answers.

        Raises:
            EngineError: the engine does not answer, or the server has ended.
        """
        if self.ended.is_set() or not await self.relay.ready(_READY_S):
            raise EngineError(
                "pat-serve of this replica",
                expected="an engine that answers",
                found=f"that it ended with {self._process.returncode}" if self.ended.is_set() else "no answer",
                fix="Ray Serve replaces the replica; its log has the reason.",
            )

    async def stop(self) -> None:
        """Let the server end the requests under way (its --shutdown-timeout), and wait for its end."""
        if not self.ended.is_set():
            self._process.terminate()
            await self.ended.wait()
        await self.relay.aclose()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self.ended.set)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_lines.append(line)
            sys.stderr.write(line)

    def _last_words(self) -> str:
        # A refusal is one line that begins with the command's name; typer draws a box around its own.
        lines = [told for line in self._last_lines if (told := line.strip(_BOX))]
        ours = [line for line in lines if line.startswith("pat-serve:")]
        return (ours or lines or ["nothing"])[-1].strip()


def _free_port() -> int:
    # Another program may take the port before the server does. The server then says so, and Ray Serve starts another
    # replica.
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port
