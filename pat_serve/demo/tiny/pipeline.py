"""The small demo, which needs nothing from a network: a Llama that is trained here, tuned twice, and compared."""

from __future__ import annotations

import json
from pathlib import Path

from pat_serve.demo.stages import Stage, Stages
from pat_serve.files.atomic import write_json
from pat_serve.terminal.progress import say

QUESTIONS = 6
# Both methods have the same steps, tokens, learning rate and LoRA.
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
NOTICE = """\
The small demo's model, pruned.

A Llama that pat-demo --tiny trained from random weights on signatures and docstrings of Python's standard library (PSF
License Agreement), and that pat-serve pruned. It is good for a first try only; README.md and pat_export.json say how it
was made.
"""
# The paper's shapes, cut to what a small machine holds: the head shrinks like the layers, so the ceiling stays.
SPEEDUP = [
    *("--baseline", "llama2-7b"),
    *("--candidate", "llama2-7b-pat25"),
    *("--layers", "2"),
    *("--load-format", "dummy"),
    *("--claim", "1.33"),
]


class Pipeline(Stages):
    """All stages over one folder.

    Args:
        out: demo-out/.
    """

    name = "tiny"
    notice = NOTICE
    model_stages = ("corpus", "base", "pat", "export_pruned", "notice")

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.base = out / "base"
        self.runs = {"lora": out / "runs/lora", "pat": out / "runs/pat"}
        self.models = {"dense": out / "dense", "pruned": self.pruned}

    def stages(self) -> list[Stage]:
        """List the stages in order."""
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
            Stage(name="notice", title="Say in the pruned model's folder what it is made of",
                  output=self.pruned / "NOTICE", run=self.write_notice),
            Stage(name="quality", title="Measure held-out perplexity through the exported checkpoints",
                  output=self.out / "quality.json", run=self.measure_quality),
            Stage(name="serve", title="Serve both with vLLM and ask them the same questions over HTTP",
                  output=self.out / "answers.json", run=self.serve),
            Stage(name="speedup", title="Check the claimed speed-up on the paper's shapes",
                  output=self.out / "speedup.json", run=self.check_speedup),
            Stage(name="report", title="Write the report", output=self.out / "report.html", run=self.report),
        ]  # fmt: skip

    def make_corpus(self) -> None:
        """Write instruction rows, and the base's texts."""
        from pat_serve.demo.corpus import build_corpus, write_rows
        from pat_serve.files.atomic import new_folder

        corpus = build_corpus()
        with new_folder(self.data) as staging:
            write_rows(staging / "train.jsonl", corpus.train_rows)
            write_rows(staging / "heldout.jsonl", corpus.held_out_rows)
            write_rows(staging / "base.jsonl", [{"text": text} for text in corpus.base_texts])
        say(f"  {len(corpus.train_rows)} instructions, {len(corpus.held_out_rows)} more from held-out modules")

    def make_base(self) -> None:
        """Train the base model on the corpus's texts."""
        from pat_serve.demo.tiny.base_model import BaseSettings, train_base

        lines = (self.data / "base.jsonl").read_text(encoding="utf-8").splitlines()
        train_base([json.loads(line)["text"] for line in lines], self.base, BaseSettings())

    def tune(self, method: str) -> None:
        """Start a training run, or resume it if it was interrupted."""
        run = self.runs[method]
        if (run / "recipe.yaml").exists():
            self.command("pat-train", ["--resume", str(run)])
            return
        settings = ["--model", str(self.base), "--data", str(self.data / "train.jsonl"), "--method", method]
        pruning = ["--ratio", "0.25"] if method == "pat" else []
        self.command("pat-train", [*settings, *pruning, *BUDGET, "--out", str(run)])

    def export(self, method: str, name: str) -> None:
        """Export a run, with its parity gate."""
        self.command("pat-export", ["--ckpt", str(self.runs[method]), "--out", str(self.models[name])])

    def measure_quality(self) -> None:
        """Measure the perplexity of base, dense and pruned on the held-out rows."""
        models = [str(self.base), *(str(folder) for folder in self.models.values())]
        arguments = [*models, "--data", str(self.data / "heldout.jsonl"), "--max-length-tokens", "128", "--json"]
        write_json(self.out / "quality.json", json.loads(self.command("pat-eval", arguments)))

    def serve(self) -> None:
        """Take answers and latencies of both models over HTTP."""
        from pat_serve.demo.serving import ask, latency, servers

        lines = (self.data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        # The questions are evenly spread, so that they cover several modules.
        rows = [json.loads(line) for line in lines[:: max(1, len(lines) // QUESTIONS)]][:QUESTIONS]
        with servers({name: [str(folder)] for name, folder in self.models.items()}, self.out) as running:
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
        """Check the speed-up; any of the three verdicts is a result."""
        partial = self.out / "speedup.json.partial"
        self.command("pat-bench", ["speedup", *SPEEDUP, "--out", str(partial), "--force"], accepted=(0, 1, 3))
        partial.replace(self.out / "speedup.json")

    def report(self) -> None:
        """Write report.json, then report.html from it."""
        from pat_serve.demo.tiny.findings import collect
        from pat_serve.demo.tiny.report import render

        findings = collect(self.out)
        self.write_report(findings, render(findings))

    def summary_lines(self) -> list[str]:
        """Tell the outcome in a few lines for the terminal."""
        from pat_serve.demo.tiny.findings import summary_lines

        return summary_lines(self.out)
