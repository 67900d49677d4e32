"""pat-train as real processes, one or several ranks, without ten seconds of imports for each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

# Forks itself for every line that it reads, once a rank. accelerate shards on accelerators alone and would train with
# DDP here without a word, so under FSDP its state is told that the CPU is one.
FORK_SERVER = """
import json, os, re, resource, signal, subprocess, sys
import accelerate.state, datasets, peft, torch, torch.utils.tensorboard, transformers
import pat_serve.training.run, pat_serve.training.model.insert
import pat_serve.training.loop.callbacks, pat_serve.training.loop.trainer
from pat_serve.cli.train import main

def shard_on_cpu():
    state, fsdp = accelerate.state.AcceleratorState, accelerate.state.DistributedType.FSDP
    begin = state.__init__
    def begin_sharded(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        if settings.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = fsdp, settings["fsdp_plugin"]
            accelerate.state.PartialState._shared_state["distributed_type"] = fsdp
    state.__init__ = begin_sharded

def kill_at(pattern):
    moment = re.compile(pattern)
    def watch(event, arguments):
        if event in ("open", "os.mkdir", "os.rename") and moment.search(" ".join(map(str, (event, *arguments[:2])))):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

def full_at(pattern, most_bytes):
    moment = re.compile(pattern)
    def watch(event, arguments):
        if event in ("open", "os.mkdir") and moment.search(" ".join(map(str, (event, *arguments[:2])))):
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most))
    sys.addaudithook(watch)

print("ready", flush=True)
for line in sys.stdin:
    arguments, log, environments = json.loads(line)
    pids = []
    for environment in environments:
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        writer = None
        if "FULL_AT" in environment:
            # The pipe belongs to another process, whose file may grow.
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
            file = writer.stdin.fileno()
        os.dup2(file, 2)
        # The server's own may have been a file, whose writer seeks: here it may be a pipe.
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        if "ACCELERATE_USE_FSDP" in environment:
            shard_on_cpu()
        if "KILL_AT" in environment:
            kill_at(environment["KILL_AT"])
        if "FULL_AT" in environment:
            full_at(environment["FULL_AT"], int(environment["FULL_BYTES"]))
        sys.argv = ["pat-train", *arguments]
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        sys.stderr.flush()
        if writer is not None:
            os.close(2)
            writer.stdin.close()
            writer.wait()
        os._exit(status)
    print(pids[0], flush=True)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
"""


class Trainings:
    """Starts pat-train again and again, each time as processes of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def _start(self, arguments: list[str], environments: list[dict[str, str]]) -> int:
        assert self.server.stdin is not None
        self.log.write_text("")
        self.server.stdin.write(json.dumps([arguments, str(self.log), environments]) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def run(self, arguments: list[str]) -> int:
        """Train to the end; the exit code."""
        self._start(arguments, [{}])
        return int(self._answer())

    def run_ranks(self, arguments: list[str], settings: dict[str, str], count: int = 2) -> list[int]:
        """Train to the end with several processes; their exit codes.

        Args:
            arguments: of pat-train.
            settings: environment that `accelerate launch` would give every rank.
            count: of processes.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        ranks = [settings | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self._start(arguments, ranks)
        return [int(code) for code in self._answer().split()]

    def kill_at(self, moment: str, arguments: list[str]) -> None:
        """Train until the process is about to touch a file, and have it killed with SIGKILL right then.

        The process does it to itself: a test that watched it from outside could look away too long.

        Args:
            moment: regular expression on "open PATH", "os.mkdir PATH" or "os.rename FROM TO" (sys.addaudithook).
            arguments: of pat-train.
        """
        self._start(arguments, [{"KILL_AT": moment}])
        assert int(self._answer()) == -signal.SIGKILL, f"{moment} never came: {self.log.read_text()}"

    def full_at(self, moment: str, arguments: list[str], most_bytes: int = 64) -> int:
        """Train on a disk that takes next to nothing more once the process touches a file; the exit code.

        The bound is one on a file's size (RLIMIT_FSIZE), whose error takes the same way through Python, Rust and C++
        as a full disk's.

        Args:
            moment: regular expression on "open PATH" or "os.mkdir PATH".
            arguments: of pat-train.
            most_bytes: that a file may have from then on.
        """
        self._start(arguments, [{"FULL_AT": moment, "FULL_BYTES": str(most_bytes)}])
        return int(self._answer())

    def close(self) -> None:
        """End the server that forks the trainings."""
        self.server.communicate()
