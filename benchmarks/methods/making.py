"""One row of the table, made by the commands that a user has; each stage is kept when it is finished."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods.answers import answer_of
from benchmarks.methods.rows import DENSE, ROWS, Row
from pat_serve.files.atomic import write_json, write_text
from pat_serve.machine.hardware import describe
from pat_serve.shapes.sizes import ModelSizes, decode_bytes

CONTEXT_TOKENS = 512
# All rows share these settings; a step has 2,048 tokens at most.
SHARED: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length_tokens": 256,
    "calibration_rows": 128,
    # The default when the table was made; a method with a rate of its own names it in its row.
    "learning_rate": 2e-4,
}
# A batch of one and a short context, as a chat begins.
BATCH_SIZE, DECODE_CONTEXT = 1, 128


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The model, the data and the lengths of the whole table; the fields are the options of the command."""

    model: Path
    data: Path
    wikitext2: Path
    items: Path | None
    out: Path
    steps: int
    limit: int
    rounds: int
    ask: bool

    def folder_of(self, name: str) -> Path:
        """Where a row's run, export and figures lie."""
        return self.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def figures_of(self, name: str) -> Path:
        """The row's figures."""
        return self.folder_of(name) / "row.json"

    def model_of(self, name: str) -> Path:
        """The row's checkpoint."""
        return self.model if name == DENSE else self.folder_of(name) / "model"


def make(name: str, setup: Setup) -> None:
    """Make a row, or what of it is missing; the row that it begins with too."""
    row, folder = ROWS[name], setup.folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = setup.figures_of(name)
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures |= {"name": name, "axes": row.axes, "trains": row.trains, "source": row.source}
    if name != DENSE and "train_s" not in figures:
        if row.base is not None:
            make(row.base, setup)
        figures["train_s"] = _train(name, row, setup)
    if "parameters" not in figures:
        figures |= _sizes(setup.model_of(name))
    if "measures" not in figures:
        figures["measures"] = _quality(name, setup)
    if setup.rounds and "speed" not in figures:
        figures["speed"] = _speed(name, setup)
    if setup.ask and "answer" not in figures:
        figures["answer"] = answer_of(setup.model_of(name), folder / "serve.log")
    machine = describe()
    figures["machine"] = {key: machine[key] for key in ("cpu_model", "cpu_cores")}
    own = {setting: row.recipe[setting] for setting in SHARED if setting in row.recipe}
    steps = (shared_by(row, setup.steps) | dict(row.recipe)).get("max_steps", 0) if row.trains else 0
    lengths = {"steps": steps, "limit": setup.limit, "context_tokens": CONTEXT_TOKENS}
    figures["protocol"] = lengths | SHARED | own
    write_json(path, figures)


def _train(name: str, row: Row, setup: Setup) -> float:
    """Train and export; seconds of the training command, what was done before an interruption included."""
    folder = setup.folder_of(name)
    base = setup.model if row.base is None else setup.model_of(row.base)
    recipe = {"model": str(base), "data": str(setup.data), **shared_by(row, setup.steps), **row.recipe}
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    seconds = folder / "seconds.json"
    before = json.loads(seconds.read_text(encoding="utf-8"))["train_s"] if seconds.exists() else 0.0
    began_s = time.monotonic()
    try:
        _call("train", "--config", folder / "recipe.yaml", "--out", folder / "run", "--resume", "auto")
    finally:
        write_json(seconds, {"train_s": before + time.monotonic() - began_s})
    export = ("--ckpt", folder / "run", "--out", folder / "model")
    _call("export", *export, "--force", codes=(0, 1))
    if not (folder / "model").exists():
        # The gate refuses 16 bits that lose a small update; the checkpoint then has the weights as trained.
        _call("export", *export, "--dtype", "float32")
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return float(json.loads(seconds.read_text(encoding="utf-8"))["train_s"])


def shared_by(row: Row, steps: int) -> dict[str, Any]:
    """The shared settings that the row's method has a use for; a row of smaller steps makes more of them."""
    from pat_serve.training.methods import METHODS

    method = METHODS[row.recipe.get("method", "cut" if "shape" in row.recipe else "pat")]
    more = SHARED["batch_size"] // row.recipe.get("batch_size", SHARED["batch_size"])
    shared = {**SHARED, "max_steps": steps * more, "save_steps": 20, "report_to": "none"}
    return {name: value for name, value in shared.items() if name not in method.unused}


def _sizes_of(model: Path) -> ModelSizes:
    return ModelSizes.of(json.loads((model / "config.json").read_text(encoding="utf-8")), source=str(model))


def _sizes(model: Path) -> dict[str, Any]:
    sizes = _sizes_of(model)
    record = model / "pat_export.json"
    sparsity = json.loads(record.read_text(encoding="utf-8"))["sparsity"] if record.exists() else None
    return {
        "parameters": sizes.parameters,
        "zeros": sparsity["zeros"] / sparsity["numbers"] if sparsity else 0.0,
        "decode_bytes": decode_bytes(sizes, batch_size=BATCH_SIZE, context_tokens=DECODE_CONTEXT, dtype_bytes=2),
    }


def _quality(name: str, setup: Setup) -> dict[str, float]:
    """Figures of pat-eval by measure."""
    tasks = ("--tasks", "pat14_ll", "--task-data", setup.items) if setup.items else ()
    text = ("--wikitext2", setup.wikitext2, "--context-tokens", CONTEXT_TOKENS)
    told = _call("eval", setup.model_of(name), *text, *tasks, "--limit", setup.limit, "--json")
    return {measure["name"]: measure["results"][0]["value"] for measure in json.loads(told)["measures"]}


def _speed(name: str, setup: Setup) -> dict[str, Any]:
    """Ratios of pat-bench speedup by phase, with their intervals; empty where the sizes are the dense model's.

    Speed follows from the sizes alone, so a row of the same sizes lends its own.
    """
    sizes = _sizes_of(setup.model_of(name))
    if sizes == _sizes_of(setup.model):
        return {}
    for other in (one for one in ROWS if one != name and setup.figures_of(one).exists()):
        figures = json.loads(setup.figures_of(other).read_text(encoding="utf-8"))
        if figures.get("speed") and _sizes_of(setup.model_of(other)) == sizes:
            return {**figures["speed"], "measured_on": other}
    out = setup.folder_of(name) / "speedup.json"
    pair = ("--baseline", setup.model, "--candidate", setup.model_of(name))
    # The exit code is the verdict on a claim, and nobody makes a claim here.
    _call("bench", "speedup", *pair, "--rounds", setup.rounds, "--out", out, "--force", codes=(0, 1, 3))
    regimes = json.loads(out.read_text(encoding="utf-8"))["regimes"]
    return {regime["regime"]: regime["ratio"] for regime in regimes}


def _call(command: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command of the package; its standard output."""
    script = f"from pat_serve.cli.{command} import main; main()"
    given = list(map(str, arguments))
    done = subprocess.run([sys.executable, "-c", script, *given], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"pat-{command} {' '.join(given)} ended with {done.returncode}")
    return done.stdout
