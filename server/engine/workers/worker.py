"""One engine in one process, driven by JSON lines; `WORKER` in process.py names this module.

Commands and replies travel on their own file descriptors; stdout and stderr belong to vLLM's log.
"""

from __future__ import annotations

import os
import queue
import resource
import sys
import threading
import time
import traceback

from pat_serve.server.engine.workers.protocol import (
    Command,
    Decode,
    Failed,
    Prefill,
    Probe,
    Probed,
    Ready,
    Score,
    Scored,
    Serve,
    Served,
    Start,
    Stepped,
)
from pat_serve.server.engine.workers.stepped import SteppedEngine


def main() -> None:
    """Obey commands until the parent closes the pipe, which it also does by dying."""
    command_fd, reply_fd = (int(argument) for argument in sys.argv[1:3])
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(command_fd, commands), daemon=True).start()
    worker = _Worker()
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        while True:
            reply = worker.obey(Command.validate_json(commands.get()))
            replies.write(reply.model_dump_json() + "\n")
            replies.flush()


def _read(command_fd: int, commands: queue.SimpleQueue[str]) -> None:
    """Pass commands on. When the pipe closes, end at once, even in the middle of a step, since nobody waits."""
    with os.fdopen(command_fd, encoding="utf-8") as lines:
        for line in lines:
            commands.put(line)
    os._exit(1)


class _Worker:
    def __init__(self) -> None:
        self._engine: SteppedEngine | None = None

    def obey(
        self, command: Start | Prefill | Decode | Probe | Score | Serve
    ) -> Ready | Stepped | Probed | Scored | Served | Failed:
        try:
            if isinstance(command, Start):
                return self._start(command)
            assert self._engine is not None, "the first command must be start"
            if isinstance(command, Probe):
                return Probed(rates=self._engine.probe(command.rows))
            if isinstance(command, Score):
                return Scored(scores=self._engine.score(command.request))
            if isinstance(command, Serve):
                requests, token_ids = self._engine.serve(**command.model_dump(exclude={"kind"}))
                return Served(requests=requests, token_ids=token_ids)
            if isinstance(command, Prefill):
                self._engine.prefill(command.prompts, output_tokens=command.output_tokens)
            else:
                self._engine.decode(command.steps)
            return Stepped(trace=self._engine.take_trace())
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            return Failed(error=f"{type(error).__name__}: {error}")

    def _start(self, command: Start) -> Ready:
        begun_s = time.monotonic()
        self._engine = SteppedEngine(**command.model_dump(exclude={"kind"}))
        # Linux counts the peak in KiB.
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Ready(
            start_s=time.monotonic() - begun_s, peak_memory_bytes=peak_bytes, gpu_memory_bytes=_gpu_memory_bytes()
        )


def _gpu_memory_bytes() -> int | None:
    """The most that torch has held on the GPU for this process so far; None without a GPU."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
