"""The demo's stages in order. Each leaves a file or folder that is complete or absent, so a second call goes on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.atomic import write_json
from pat_serve.errors import PatServeError
from pat_serve.progress import say

QUESTIONS = 6
# What leads to the pruned model and nothing else.
MODEL_STAGES = ("corpus", "base", "pat", "export_pruned")
# Equal for both methods: optimizer steps, tokens, learning rate, LoRA.
BUDGET = [
    *("--max-steps", "100"),
    *("--batch-size", "32"),
    *("--gradient-accumulation-steps", "1"),
    *("--max-length-tokens", "128"),
    *("--learning-rate", "2e-3"),
    *("--lora-alpha", "20"),
    *("--max-grad-norm", "1.0"),
    *("--logging-steps", "4"),
    *("--save-steps", "40"),
    *("--seed", "0"),
]
# The paper's shapes, cut to what a small machine holds: the head shrinks like the layers, so the ceiling stays.
SPEEDUP = [
    *("--baseline", "llama2-7b"),
    *("--candidate", "llama2-7b-pat25"),
    *("--layers", "2"),
    *("--load-format", "dummy"),
    *("--claim", "1.33"),
]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: key of its time in timings.json.
        title: what a person reads.
        output: exists exactly when the stage is done.
        run: does it.
    """

    name: str
    title: str
    output: Path
    run: Callable[[], None]


class Pipeline:
    """All stages over one folder.

    Args:
        out: demo-out/.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data = out / "data"
        self.base = out / "base"
        self.runs = {"lora": out / "runs/lora", "pat": out / "runs/pat"}
        self.models = {"dense": out / "dense", "pruned": out / "pruned"}
        self.timings_file = out / "timings.json"

    def stages(self) -> list[Stage]:
        """In order."""
        return [
            Stage(name="corpus", title="Collect documentation that ships with Python", output=self.data,
                  run=self.make_corpus),
            Stage(name="base", title="Train a small Llama on it: the base model", output=self.base, run=self.make_base),
            Stage(name="lora", title="Fine-tune it densely with LoRA, the reference",
                  output=self.runs["lora"] / "plan.json", run=lambda: self.tune("lora")),
            Stage(name="pat", title="Fine-tune it again with the same budget while PAT prunes a quarter of its width",
                  output=self.runs["pat"] / "plan.json", run=lambda: self.tune("pat")),
            Stage(name="export_dense", title="Export the dense reference", output=self.models["dense"],
                  run=lambda: self.export("lora", "dense")),
            Stage(name="export_pruned", title="Export the pruned model, through the parity gate",
                  output=self.models["pruned"], run=lambda: self.export("pat", "pruned")),
            Stage(name="quality", title="Measure held-out perplexity through the exported checkpoints",
                  output=self.out / "quality.json", run=self.measure_quality),
            Stage(name="serve", title="Serve both with vLLM and ask them the same questions over HTTP",
                  output=self.out / "answers.json", run=self.serve),
            Stage(name="speedup", title="Check the claimed speed-up on the paper's shapes",
                  output=self.out / "speedup.json", run=self.check_speedup),
            Stage(name="report", title="Write the report", output=self.out / "report.html", run=self.report),
        ]  # fmt: skip

    def run(self, *, model_only: bool = False) -> None:
        """Run what is not there yet; with `model_only` no further than the pruned model."""
        self.out.mkdir(parents=True, exist_ok=True)
        stages = [stage for stage in self.stages() if not model_only or stage.name in MODEL_STAGES]
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
            say(f"  done in {seconds:.0f} s: {stage.output}")

    def timings(self) -> dict[str, float]:
        """Seconds of each finished stage, when it ran."""
        return self._read("timings.json") if self.timings_file.exists() else {}

    def make_corpus(self) -> None:
        """Instruction rows, and the base's texts."""
        from pat_serve.atomic import new_folder
        from pat_serve.demo.corpus import build_corpus, write_rows

        corpus = build_corpus()
        with new_folder(self.data) as staging:
            write_rows(staging / "train.jsonl", corpus.train_rows)
            write_rows(staging / "heldout.jsonl", corpus.held_out_rows)
            write_rows(staging / "base.jsonl", [{"text": text} for text in corpus.base_texts])
        say(f"  {len(corpus.train_rows)} instructions, {len(corpus.held_out_rows)} more from held-out modules")

    def make_base(self) -> None:
        """The base model."""
        from pat_serve.demo.base_model import BaseSettings, train_base

        lines = (self.data / "base.jsonl").read_text(encoding="utf-8").splitlines()
        train_base([json.loads(line)["text"] for line in lines], self.base, BaseSettings())

    def tune(self, method: str) -> None:
        """One training run, resumed if it was interrupted."""
        run = self.runs[method]
        if (run / "recipe.yaml").exists():
            self._command("pat-train", ["--resume", str(run)])
            return
        settings = ["--model", str(self.base), "--data", str(self.data / "train.jsonl"), "--method", method]
        pruning = ["--ratio", "0.25"] if method == "pat" else []
        self._command("pat-train", [*settings, *pruning, *BUDGET, "--out", str(run)])

    def export(self, method: str, name: str) -> None:
        """One export with its parity gate."""
        self._command("pat-export", ["--ckpt", str(self.runs[method]), "--out", str(self.models[name])])

    def measure_quality(self) -> None:
        """Perplexity of base, dense and pruned on the held-out rows."""
        models = [str(self.base), *(str(folder) for folder in self.models.values())]
        arguments = [*models, "--data", str(self.data / "heldout.jsonl"), "--max-length-tokens", "128", "--json"]
        write_json(self.out / "quality.json", json.loads(self._command("pat-eval", arguments)))

    def serve(self) -> None:
        """Answers and latencies of both models over HTTP."""
        from pat_serve.demo.serving import ask, latency, servers

        lines = (self.data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        # Evenly spread, so that several modules are asked about.
        rows = [json.loads(line) for line in lines[:: max(1, len(lines) // QUESTIONS)]][:QUESTIONS]
        with servers(self.models, self.out) as running:
            questions = [
                {
                    "prompt": row["prompt"],
                    "reference": row["completion"],
                    "answers": {name: ask(server, row["prompt"]) for name, server in running.items()},
                }
                for row in rows
            ]
            latencies = {name: latency(server) for name, server in running.items()}
        write_json(self.out / "answers.json", {"questions": questions, "latency": latencies})

    def check_speedup(self) -> None:
        """A verdict; any of the three is a result."""
        partial = self.out / "speedup.json.partial"
        self._command("pat-bench", ["speedup", *SPEEDUP, "--out", str(partial), "--force"], accepted=(0, 1, 3))
        partial.replace(self.out / "speedup.json")

    def report(self) -> None:
        """report.json, then report.html from it."""
        from pat_serve.demo.findings import collect
        from pat_serve.demo.report import render

        findings = collect(self.out)
        write_json(self.out / "report.json", findings)
        temporary = self.out / ".report.html.partial"
        temporary.write_text(render(findings), encoding="utf-8")
        temporary.replace(self.out / "report.html")

    def _read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text(encoding="utf-8"))

    def _command(self, name: str, arguments: list[str], accepted: tuple[int, ...] = (0,)) -> str:
        """Run one of our commands as a user would, its progress on our stderr.

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


def start_over(out: Path) -> None:
    """Delete an earlier demo's folder."""
    if out.exists():
        shutil.rmtree(out)
