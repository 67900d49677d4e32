"""Exports in processes of their own that are killed, starved of disk or raced, at moments that a test chooses.

Run as a script, this file imports the exporter once and then forks a child for each line that it reads: a killed
export costs a fork and not the seconds of importing torch. Before the first line it makes an export of its own, which
imports what comes in by and by: half of transformers, three seconds of work for every child.

A moment is counted in audit events (files opened, folders made, names changed), so it is the same one on every machine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# The events that change or read files; every block of a weight opens its shard.
EVENTS = frozenset(
    ["open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"]
)


class Children:
    """Starts children; each is a line of settings, and answers with a line.

    Args:
        prefix: of the command line that starts the process.
        warm: a run to be exported once, for children that get as far.
    """

    def __init__(self, prefix: tuple[str, ...] = (), *, warm: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__, *([str(warm)] if warm else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def send(self, **settings: Any) -> None:
        """Start children, together: one for each number in `count` (1 by default)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings, default=str) + "\n")
        self._process.stdin.flush()

    def answer(self) -> list[dict[str, Any]]:
        """The end of each child: `code` (negative for a signal), `events`, `message` and `left`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process that starts exports ended with {self._process.wait()}"
        answer: list[dict[str, Any]] = json.loads(line)
        return answer

    def run(self, **settings: Any) -> dict[str, Any]:
        """One child, to its end."""
        self.send(**settings)
        return self.answer()[0]

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _child(settings: dict[str, Any], number: int, report: int) -> None:
    """One export; the report is written to a descriptor, and is empty when the export was killed."""
    from pat_serve.errors import PatServeError
    from pat_serve.export import exporter

    ckpt, out = Path(settings["ckpt"]), Path(settings["out"])
    places = (str(ckpt.parent), str(out.parent))
    if "fsize" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["fsize"], settings["fsize"]))
    if settings.get("skip_dry_run"):
        exporter._check_fits = lambda *_: None
    events = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if event not in EVENTS or not any(str(argument).startswith(places) for argument in arguments):
            return
        if event == "os.rename" and str(arguments[1]) == str(out) and number == settings.get("late"):
            # The last step but one is done: wait for the others to end before the name is taken.
            while not Path(settings["gate"]).exists():
                time.sleep(0.01)
        if events == settings.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1

    sys.addaudithook(watch)
    answer: dict[str, Any] = {"code": 0, "message": ""}
    try:
        exporter.export_run(ckpt, out, parity=settings.get("parity", False), force=settings.get("force", False))
    except PatServeError as error:
        answer = {"code": error.exit_code, "message": f"{type(error).__name__}: {error}"}
    except BaseException as error:
        answer = {"code": 99, "message": f"{type(error).__name__}: {error}"}
    os.write(report, json.dumps(answer | {"events": events}).encode())
    os._exit(0)


def _serve() -> None:
    exporter = import_module("pat_serve.export.exporter")  # before the forks
    for warm in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            exporter.export_run(Path(warm), Path(folder) / "out", parity=False)
    for line in sys.stdin:
        settings = json.loads(line)
        children = []
        for number in range(settings.get("count", 1)):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                _child(settings, number, write)
            os.close(write)
            children.append((pid, read))
        if "kill_after_s" in settings:
            time.sleep(settings["kill_after_s"])
            os.kill(children[0][0], signal.SIGKILL)
        answers: dict[int, dict[str, Any]] = {}
        # The late one waits for all others.
        late = settings.get("late", -1)
        for number in sorted(range(len(children)), key=lambda number: number == late):
            if number == late:
                Path(settings["gate"]).touch()
            pid, read = children[number]
            with os.fdopen(read) as pipe:
                text = pipe.read()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answers[number] = json.loads(text) if text else {"code": code, "message": "", "events": -1}
        left = sorted(os.listdir(Path(settings["out"]).parent))
        print(json.dumps([answers[number] | {"left": left} for number in sorted(answers)]), flush=True)


if __name__ == "__main__":
    _serve()
