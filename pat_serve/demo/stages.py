"""Stages of a demo, in order. Each leaves a file or folder that is complete or absent, so a second call goes on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.errors import PatServeError, UsageError
from pat_serve.files.atomic import write_json
from pat_serve.terminal.progress import say


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a demo.

    Attributes:
        name: key of its time in timings.json.
        title: text that a person reads.
        output: exists exactly when the stage is done.
        run: does the work.
    """

    name: str
    title: str
    output: Path
    run: Callable[[], None]


class Stages(ABC):
    """All stages of a demo over one folder.

    Args:
        out: demo-out/.
    """

    # The demo's name; an output folder belongs to one demo.
    name: str
    # Goes with the pruned model.
    notice: str
    # The stages that lead to the pruned model, without its measurements.
    model_stages: Collection[str]

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data = out / "data"
        self.pruned = out / "pruned"
        self.timings_file = out / "timings.json"

    @abstractmethod
    def stages(self) -> list[Stage]:
        """List the stages in order."""

    @abstractmethod
    def summary_lines(self) -> list[str]:
        """Tell the outcome in a few lines for the terminal."""

    def run(self, *, model_only: bool = False) -> None:
        """Run what is not there yet; with `model_only` no further than the pruned model.

        Raises:
            UsageError: the folder holds the other demo.
        """
        self._refuse_the_other()
        stages = [stage for stage in self.stages() if not model_only or stage.name in self.model_stages]
        # The report says what is in the folder; it is cheap, and never older than what it shows.
        (self.out / "report.html").unlink(missing_ok=True)
        for number, stage in enumerate(stages, start=1):
            if stage.output.exists():
                say(f"[{number}/{len(stages)}] {stage.title}: already there ({stage.output})")
                continue
            say(f"[{number}/{len(stages)}] {stage.title}")
            started = time.monotonic()
            stage.run()
            seconds = time.monotonic() - started
            write_json(self.timings_file, self.timings() | {stage.name: seconds})
            # The folder is this demo's from its first result on: one that could fetch nothing leaves it to the other.
            write_json(self.out / "demo.json", {"demo": self.name})
            say(f"  done in {seconds:.0f} s: {stage.output}")

    def timings(self) -> dict[str, float]:
        """Read the seconds of each finished stage, as it ran."""
        return self.read("timings.json") if self.timings_file.exists() else {}

    def read(self, name: str) -> Any:
        """Read a JSON file of the demo's folder."""
        return json.loads((self.out / name).read_text(encoding="utf-8"))

    def write_report(self, findings: dict[str, Any], html: str) -> None:
        """Write report.json, then report.html from it."""
        write_json(self.out / "report.json", findings)
        temporary = self.out / ".report.html.partial"
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(self.out / "report.html")

    def command(self, name: str, arguments: list[str], accepted: tuple[int, ...] = (0,)) -> str:
        """Run one of our commands as a user would, with its progress on our stderr.

        Returns:
            its stdout.
        """
        say(f"  $ {name} {shlex.join(arguments)}")
        program = Path(sys.executable).with_name(name)
        done = subprocess.run([str(program), *arguments], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in accepted:
            raise PatServeError(
                name,
                expected="to succeed",
                found=f"exit code {done.returncode}",
                fix="Its message stands above; run the demo again to go on from here.",
            )
        return done.stdout

    def write_notice(self) -> None:
        """pruned/NOTICE: which model the demo has made, out of what, and under which terms."""
        temporary = self.out / ".NOTICE.partial"
        temporary.write_text(self.notice, encoding="utf-8")
        temporary.replace(self.pruned / "NOTICE")

    def _refuse_the_other(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        mark = self.out / "demo.json"
        # Folders of versions before there were two demos hold the small one's base.
        found = self.read("demo.json")["demo"] if mark.exists() else "tiny" if (self.out / "base").exists() else None
        if found not in (None, self.name):
            raise UsageError(
                self.out,
                expected=f"an empty folder, or an earlier {self.name} demo to go on with",
                found=f"the {found} demo",
                fix="Give another --out, or --start-over to delete what is there.",
            )


def start_over(out: Path) -> None:
    """Delete an earlier demo's folder."""
    if out.exists():
        shutil.rmtree(out)
