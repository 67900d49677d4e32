"""The search of a shape: what is tried, what is kept, and how a run goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.training.config import TrainRecipe
from pat_serve.training.recipe_file import read_recipe
from pat_serve.training.run import start, start_or_resume
from pat_serve.training.search.candidates import WITHIN, candidates
from pat_serve.training.search.search import SEARCH_FILE
from tests.tiny_models import save_tiny_family

SETTINGS = {
    "ratio": 0.25, "search_minutes": 0.5, "max_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 1,
    "dtype": "float32", "lora_rank": 4, "calibration_rows": 8, "distillation_weight": 1.0,
}  # fmt: skip


def asked(base: Path, rows: Path, **settings: Any) -> TrainRecipe:
    return TrainRecipe.build({"model": str(base), "data": str(rows), **SETTINGS, **settings}, "test")


def wide_base(folder: Path) -> Path:
    """A model with room for mixes: eight layers, 256 FFN channels."""
    return save_tiny_family(folder, "llama", num_hidden_layers=8, intermediate_size=256, tie_word_embeddings=True)


def test_candidates_are_as_large_as_asked(tmp_path: Path):
    checkpoint = open_checkpoint(str(wide_base(tmp_path / "base")))
    found = candidates(checkpoint, 0.25)
    assert len({tuple(one.shape.items()) for one in found}) == len(found) >= 4
    assert len({frozenset(one.shape) for one in found}) >= 3, "mixes of several axes"
    whole = checkpoint.sizes.parameters
    for one in found:
        cut = 1 - checkpoint.sizes.with_counts(one.shape).parameters / whole
        assert one.cut == pytest.approx(cut)
        assert abs(cut - 0.25) <= WITHIN
        assert one.speedup > 1
    inner = candidates(checkpoint, 0.25, ("layers", "ffn"))
    assert inner == [one for one in found if set(one.shape) <= {"layers", "ffn"}]


def test_a_run_takes_the_shape_that_lost_least(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, run = wide_base(tmp_path / "base"), tmp_path / "run"
    finished = start(asked(base, rows), run)
    record = json.loads((run / SEARCH_FILE).read_text())
    assert finished.shape == {"hidden": 64, **record["shape"]}
    tried = record["tried"]
    assert len(tried) >= 2
    tuned = [one["tuned_kl"] for one in tried if one["tuned_kl"] is not None]
    first = tuned or [one["kl"] for one in tried]
    assert first == sorted(first)
    assert tried[0]["shape"] == record["shape"]
    told = ",".join(f"{axis}={count}" for axis, count in record["shape"].items())
    assert f"search: takes --shape {told}" in capsys.readouterr().err
    # The recipe repeats the run without another search.
    saved = read_recipe(run / "recipe.yaml")
    assert (saved["shape"], saved["ratio"], saved["search_minutes"]) == (record["shape"], None, 0)
    assert export_run(run, tmp_path / "out", dtype="float32").parity is not None
    # Asked for again, the run is finished, and is not searched for a second time.
    assert start_or_resume(asked(base, rows), run) is None
    with pytest.raises(UsageError, match="settings that the run began with"):
        start_or_resume(asked(base, rows, ratio=0.3), run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "layers=6", "ratio": None}, "no shape and no hidden_size"),
        ({"hidden_size": 48, "ratio": None}, "no shape and no hidden_size"),
        ({"method": "pat"}, "no method beside it"),
        ({"quantize_base": "nf4"}, "no search_minutes beside quantize_base"),
    ],
)
def test_what_leaves_nothing_to_look_for(settings: dict[str, Any], message: str, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        asked(tmp_path, rows, **settings)


def test_a_setting_that_some_candidates_have_no_use_for_is_refused_at_once(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = wide_base(tmp_path / "base")
    monkeypatch.setattr("pat_serve.training.search.search.assemble", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UsageError, match="--rotate: expected none"):
        start(asked(base, rows, rotate="loss"), tmp_path / "run")
