"""The parent's handle on an engine process: start it, talk to it, and never leave it behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from pat_serve.errors import EngineError
from pat_serve.machine.hardware import compute_cores
from pat_serve.scores import ScoreRequest, Scores
from pat_serve.server.analysis.trace import BatchTrace
from pat_serve.server.engine.workers.probe import MachineRates
from pat_serve.server.engine.workers.protocol import (
    Decode,
    Failed,
    Prefill,
    Probe,
    Probed,
    Ready,
    Reply,
    Score,
    Scored,
    Serve,
    Served,
    Start,
    Stepped,
)

# The module that an engine process runs. Tests put an engine of known latency in its place.
WORKER = "pat_serve.server.engine.workers.worker"
START_TIMEOUT_S = 3600.0
STEP_TIMEOUT_S = 3600.0
_LOG_LINES, _LINE_CHARACTERS = 12, 300


class EngineProcess:
    """One engine in its own process; a context manager that ends the process and all that it started.

    Args:
        label: how messages call it: "baseline" or "candidate".
        log: file that takes vLLM's output.
        offline: the model is on disk, so nothing may be fetched.
    """

    def __init__(self, label: str, *, log: Path, offline: bool) -> None:
        self.label = label
        self.log = log
        command_read, command_write = os.pipe()
        reply_read, reply_write = os.pipe()
        # -P keeps a file that is called like a standard module in the user's current folder from being imported.
        command = [sys.executable, "-P", "-m", WORKER, str(command_read), str(reply_write)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(command_read, reply_write),
                env=worker_environment(os.environ, scratch=log.parent, offline=offline),
                # The process has a group of its own: Ctrl-C reaches the parent alone, which then ends the group with
                # all its children.
                start_new_session=True,
            )
        os.close(command_read)
        os.close(reply_write)
        self._commands = os.fdopen(command_write, "w", encoding="utf-8")
        self._reply_fd = reply_read
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id, which is also the group's."""
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def peak_memory_bytes(self) -> int:
        """The most host memory that the process has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        # The kernel writes the peak in KiB.
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024

    def prefill(self, prompts: list[list[int]], *, output_tokens: int) -> BatchTrace | None:
        """Submit a batch and wait until each request has its first token.

        Args:
            prompts: token ids, one list for each request.
            output_tokens: of each request, exactly.

        Returns:
            the batch's trace if the batch is finished, else None.

        Raises:
            EngineError: the engine failed, died, or did not answer in time.
        """
        return self._step(Prefill(prompts=prompts, output_tokens=output_tokens))

    def decode(self, steps: int) -> BatchTrace | None:
        """Make at most so many steps; returns and raises as `prefill` does."""
        return self._step(Decode(steps=steps))

    def probe(self, *, rows: int) -> MachineRates:
        """Measure what the machine can do, in the engine's process; raises as `prefill` does.

        Args:
            rows: rows of activations in the products by which operations are counted.
        """
        reply = self._ask(Probe(rows=rows))
        assert isinstance(reply, Probed)
        return reply.rates

    def score(self, request: ScoreRequest) -> Scores:
        """Judge prompts and continue others; raises as `prefill` does."""
        reply = self._ask(Score(request=request))
        assert isinstance(reply, Scored)
        return reply.scores

    def serve(self, prompts: list[list[int]], *, output_tokens: int, concurrency: int) -> Served:
        """Answer all prompts, so many of them at a time; raises as `prefill` does."""
        reply = self._ask(Serve(prompts=prompts, output_tokens=output_tokens, concurrency=concurrency))
        assert isinstance(reply, Served)
        return reply

    def send(self, command: Start | Prefill | Decode | Probe | Score | Serve) -> None:
        """Give the engine a command; `poll` takes the answer.

        Raises:
            EngineError: the engine is dead.
        """
        try:
            self._commands.write(command.model_dump_json() + "\n")
            self._commands.flush()
        except BrokenPipeError:
            raise self._death() from None

    def poll(self, timeout_s: float) -> Ready | Stepped | Probed | Scored | Served | None:
        """The engine's answer, or None if there is none within the time.

        Raises:
            EngineError: the engine reports a failure, or has died.
        """
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._reply_fd], [], [], max(0.0, deadline_s - time.monotonic()))
            if not readable:
                return None
            data = os.read(self._reply_fd, 1 << 20)
            if not data:
                raise self._death()
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply = Reply.validate_json(line)
        if isinstance(reply, Failed):
            raise self.error("an engine that starts and runs", _gist(reply.error))
        return reply

    def kill(self) -> None:
        """End the whole process group at once; harmless when repeated."""
        if self._commands.closed:
            return
        with suppress(ProcessLookupError):  # all of it has ended already
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reply_fd)
        with suppress(BrokenPipeError):  # a command that the dead process did not take
            self._commands.close()

    def error(self, expected: str, found: str) -> EngineError:
        """Make an error that has the end of the engine's log."""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            tail = "\n".join(line.rstrip()[:_LINE_CHARACTERS] for line in deque(lines, maxlen=_LOG_LINES))
        return EngineError(
            f"engine of the {self.label}",
            expected=expected,
            found=found,
            fix=f"Its log is {self.log}; it ends with:\n{tail}",
        )

    def _step(self, command: Prefill | Decode) -> BatchTrace | None:
        reply = self._ask(command)
        assert isinstance(reply, Stepped)
        return reply.trace

    def _ask(self, command: Prefill | Decode | Probe | Score | Serve) -> Ready | Stepped | Probed | Scored | Served:
        self.send(command)
        reply = self.poll(STEP_TIMEOUT_S)
        if reply is None:
            raise self.error("an answer", f"none within {STEP_TIMEOUT_S:.0f} s")
        return reply

    def _death(self) -> EngineError:
        # WNOWAIT leaves a zombie that holds the group's number, so that `kill` cannot hit a stranger's group.
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        if status.si_code == os.CLD_EXITED:
            how = f"exit code {status.si_status}"
        else:
            how = f"signal {signal.Signals(status.si_status).name}"
        return self.error("a running engine", f"a process that ended with {how}")


def start_together(commands: Mapping[EngineProcess, Start]) -> dict[EngineProcess, Ready]:
    """Start engines side by side. Loading is single-threaded, so two engines take hardly longer than one.

    Raises:
        EngineError: an engine did not start. The error comes at once, and not after the others are up.
    """
    for engine, command in commands.items():
        engine.send(command)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    ready: dict[EngineProcess, Ready] = {}
    while len(ready) < len(commands):
        for engine in commands:
            if engine in ready:
                continue
            reply = engine.poll(0.2)
            if reply is not None:
                assert isinstance(reply, Ready)
                ready[engine] = reply
            elif time.monotonic() > deadline_s:
                raise engine.error("an engine that starts", f"none within {START_TIMEOUT_S:.0f} s")
    return ready


def _gist(error: str) -> str:
    """The telling line of an exception's text. pydantic puts a heading before it; other exceptions begin with it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return told.removeprefix("Value error, ")[:_LINE_CHARACTERS]


def worker_environment(environ: Mapping[str, str], *, scratch: Path, offline: bool) -> dict[str, str]:
    """The environment of an engine process: in-process engine, all cores, pinned threads.

    vLLM's VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_NUM_OF_RESERVED_CPU act only when it spawns its own worker process,
    and then keep a core free for a front end. Here the engine runs in the process itself and no front end runs beside
    it, so OpenMP gets every core, bound by its own variables. Values that the user has set win.

    Args:
        environ: the parent's environment.
        scratch: folder for the engine's temporary files.
        offline: forbid the hub client to reach for the network.
    """
    cores = compute_cores()
    ours = {
        "OMP_NUM_THREADS": str(len(cores)),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": ",".join(f"{{{core}}}" for core in cores),
        "VLLM_NO_USAGE_STATS": "1",
    } | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TMPDIR": str(scratch)}
    return ours | dict(environ) | forced
