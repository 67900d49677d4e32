"""A disk that is full under a training: told as what it is, and the run goes on once there is room."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pat_serve.errors import DiskFull
from pat_serve.files.disk import full_disk
from pat_serve.training.checks import room
from pat_serve.training.checks.prepare import prepare
from pat_serve.training.checks.room import run_bytes
from pat_serve.training.config import TrainRecipe
from pat_serve.training.ranks import Ranks
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.test_distillation import CUT
from tests.test_export_interruption import IN_NAMESPACE, can_mount
from tests.tiny_models import save_tiny_llama
from tests.trainings import Trainings

# A file that a run writes, how large a file may become from then on, and the state to go on from.
MOMENTS = {
    "the run's folder": (r"open .*\.partial-\S*/\.inputs\.json", 64, "nothing was left behind"),
    "metrics.jsonl": (r"open .*/metrics\.jsonl a", 64, "from its start"),
    "a checkpoint's weights": (r"os.mkdir .*/\.partial/checkpoint-5 ", 64, "from its start"),
    # The optimizer's file is written by torch, and is twice as large as the weights, which safetensors writes first.
    "a checkpoint's optimizer": (r"os.mkdir .*/\.partial/checkpoint-10 ", 300_000, "from step 5"),
    "the adapter": (r"os.mkdir .*/\.adapter\.partial-", 64, "from step 12"),
}


def arguments(base: Path, rows: Path, run: Path) -> list[str]:
    """Twelve steps, with checkpoints at 5, 10 and 12."""
    flags = ["--model", str(base), "--data", str(rows), "--out", str(run), "--resume", "auto", "--dtype", "float32"]
    flags += ["--max-steps", "12", "--save-steps", "5", "--batch-size", "4", "--gradient-accumulation-steps", "1"]
    return [*flags, "--calibration-rows", "8", "--logging-steps", "4"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_full_at(moment: str, trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path):
    run = tmp_path / "run"
    pattern, most_bytes, way_on = MOMENTS[moment]
    auto = arguments(tiny_base, rows, run)
    code = trainings.full_at(pattern, auto, most_bytes)
    told = trainings.log.read_text().splitlines()
    assert code == 1, told
    assert told[-1].startswith(f"pat-train: {run}: expected a disk that takes all files, found "), told
    assert told[-1].endswith(f"{way_on}.")
    assert run.exists() == (moment != "the run's folder")
    if moment == "a checkpoint's optimizer":
        assert trainings.run(auto) == 0, trainings.log.read_text()
        assert (run / "plan.json").is_file()


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces, to mount a small tmpfs without root")
def test_a_small_tmpfs(tiny_base: Path, rows: Path, tmp_path: Path):
    """A real one: it holds one checkpoint of the several that are to come."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = "from pat_serve.cli.train import main; main()"
    command = [sys.executable, "-c", script, *arguments(tiny_base, rows, disk / "run")]
    mount = f'mount -t tmpfs -o size=1500k tmpfs "{disk}" && exec "$@"'
    for flags, told in (([], "of free space for 3 checkpoints of "), (["--skip-preflight"], "--resume")):
        done = subprocess.run(
            [*IN_NAMESPACE, "sh", "-c", mount, "sh", *command, *flags], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert told in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["paper", "default", "all weights"])
def test_the_count_is_what_a_run_leaves(kind: str, rows: Path, tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=1024)
    run = tmp_path / "run"
    recipe = tiny_recipe(base, rows, max_steps=12)
    if kind == "default":
        recipe = TrainRecipe(
            model=str(base), data=str(rows), max_steps=12, batch_size=4, gradient_accumulation_steps=1,
            dtype="float32", save_steps=4, logging_steps=4, calibration_rows=8,
        )  # fmt: skip
    if kind == "all weights":
        recipe = tiny_recipe(base, rows, **CUT, shape={"ffn": 192}, train="all", max_steps=12)
    at_once, checkpoint, rest = run_bytes(prepare(recipe.with_absolute_paths(), Ranks.join()))
    assert at_once == 3
    start(recipe, run)
    saved = sum(path.stat().st_size for path in (run / "checkpoints/step-12").iterdir())
    assert 0.9 * checkpoint < saved <= checkpoint
    left = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    assert 0.4 * rest < left <= rest


def test_too_small_a_disk_is_seen_before_the_model_is_loaded(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(room, "_SMALL_FILES_BYTES", 2**60)
    monkeypatch.setattr("pat_serve.training.run.assemble", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(DiskFull, match=r"GB of free space for 3 checkpoints of .*--keep-checkpoints"):
        start(tiny_recipe(tiny_base, rows), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_a_full_disk():
    assert full_disk(OSError(errno.EDQUOT, "Disk quota exceeded")) == "Disk quota exceeded"
    assert full_disk(SafetensorError("I/O error: No space left on device (os error 28)")) == "No space left on device"
    torch_told = "[enforce fail at inline_container.cc:672] . unexpected pos 296768 vs 296660"
    assert full_disk(RuntimeError(torch_told)) == "a write that failed"
    outer = RuntimeError("the step failed")
    outer.__context__ = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert full_disk(outer) == "a write that failed"
    assert full_disk(OSError(errno.EACCES, "Permission denied")) is None
    assert full_disk(ValueError("no space for this")) is None
    with pytest.raises(OSError, match="No space left") as error, open("/dev/full", "w") as full:
        full.write("x")
    assert full_disk(error.value) == "No space left on device"
