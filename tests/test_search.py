"""The search of a shape: what is tried, what is kept, and how a run goes on with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.assemble import Job, assemble
from pat_serve.training.checks.prepare import Prepared
from pat_serve.training.config import TrainRecipe
from pat_serve.training.recipe_file import read_recipe
from pat_serve.training.run import start, start_or_resume
from pat_serve.training.search.candidates import WITHIN, Candidate, Target, candidates, ceiling
from pat_serve.training.search.found import SEARCH_FILE, Tried, ranked
from tests.tiny_models import save_tiny_family

SETTINGS = {
    "ratio": 0.25, "search_minutes": 0.5, "max_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 1,
    "dtype": "float32", "lora_rank": 4, "calibration_rows": 8, "distillation_weight": 0.25,
}  # fmt: skip


def asked(base: Path, rows: Path, **settings: Any) -> TrainRecipe:
    return TrainRecipe.build({"model": str(base), "data": str(rows), **SETTINGS, **settings}, "test")


def wide_base(folder: Path) -> Path:
    """A model with room for mixes: eight layers, 256 FFN channels."""
    return save_tiny_family(folder, "llama", num_hidden_layers=8, intermediate_size=256, tie_word_embeddings=True)


# A speed, and a rule in the place of a search.
SPEED = {"speedup": 1.3, "ratio": None, "search_minutes": 0}
QUARTER, FAST = Target(ratio=0.25, speedup=None), Target(ratio=None, speedup=1.3)


def test_candidates_are_as_large_as_asked(tmp_path: Path):
    checkpoint = open_checkpoint(str(wide_base(tmp_path / "base")))
    base = checkpoint.sizes

    def expected(sizes: ModelSizes) -> float:
        return base.layers / sizes.layers * 1.01

    found = candidates(checkpoint, QUARTER, expected)
    assert len({tuple(one.shape.items()) for one in found}) == len(found) >= 4
    assert len({frozenset(one.shape) for one in found}) >= 3, "mixes of several axes"
    for one in found:
        sizes = base.with_counts(one.shape)
        cut = 1 - sizes.parameters / base.parameters
        assert one.cut == pytest.approx(cut)
        assert abs(cut - 0.25) <= WITHIN
        assert one.speedup == expected(sizes)
        assert one.ceiling == ceiling(base, sizes) > 1
    inner = candidates(checkpoint, QUARTER, expected, ("layers", "ffn"))
    assert inner == [one for one in found if set(one.shape) <= {"layers", "ffn"}]


def test_candidates_are_as_fast_as_asked(tmp_path: Path):
    checkpoint = open_checkpoint(str(wide_base(tmp_path / "base")))
    base = checkpoint.sizes

    def expected(sizes: ModelSizes) -> float:
        return ceiling(base, sizes) ** 0.8

    found = candidates(checkpoint, FAST, expected)
    assert len({frozenset(one.shape) for one in found}) >= 3, "mixes of several axes"
    assert all(1.3 <= one.speedup < 1.7 for one in found)
    assert len({round(one.cut, 2) for one in found}) > 1, "sizes that are not asked for"
    assert [HIDDEN in one.shape for one in found] == sorted(HIDDEN in one.shape for one in found)
    assert candidates(checkpoint, replace(FAST, speedup=100.0), expected) == []


def tried(speedup: float, kl: float, tuned_kl: float | None = None) -> Tried:
    candidate = Candidate(shape={"ffn": round(1000 / speedup)}, cut=0.25, ceiling=1.5, speedup=speedup)
    return Tried(candidate=candidate, kl=kl, tuned_kl=tuned_kl, seconds=1.0)


def test_what_is_lost_counts_for_the_time_that_it_saves():
    slow, fast, none = tried(1.11, 0.55), tried(1.25, 0.8), tried(0.99, 0.1)
    assert slow.price == pytest.approx(0.55 / (1 - 1 / 1.11))
    assert none.price == float("inf")
    assert none.record()["price"] is None
    assert ranked([none, slow, fast], QUARTER) == [fast, slow, none]
    # Where all are fast enough, there is nothing to weigh a loss against.
    assert ranked([fast, slow, none], FAST) == [none, slow, fast]
    # Where a shape was tuned, its loss after that counts.
    tuned = tried(1.11, 0.9, tuned_kl=0.2)
    assert ranked([fast, tuned], QUARTER) == ranked([fast, tuned], FAST) == [tuned, fast]


@pytest.mark.parametrize("target", [{"ratio": 0.25}, {"ratio": None, "speedup": 1.05}])
def test_a_run_takes_the_best_shape(
    target: dict[str, Any],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    weights = []

    def assemble_seen(prepared: Prepared, *rest: Any, **named: Any) -> Job:
        weights.append(prepared.recipe.distillation_weight)
        return assemble(prepared, *rest, **named)

    monkeypatch.setattr("pat_serve.training.search.bench.assemble", assemble_seen)
    base, run = wide_base(tmp_path / "base"), tmp_path / "run"
    finished = start(asked(base, rows, **target), run)
    record = json.loads((run / SEARCH_FILE).read_text())
    assert finished.shape == {"hidden": 64, **record["shape"]}
    tried = record["tried"]
    assert len(tried) >= 2
    by = "price" if target["ratio"] else "tuned_kl" if tried[0]["tuned_steps"] else "kl"
    # One that saves no time here has no price, and stands last.
    first = [
        float("inf") if one[by] is None else one[by] for one in tried if one["tuned_steps"] == tried[0]["tuned_steps"]
    ]
    assert first == sorted(first)
    assert tried[0]["shape"] == record["shape"]
    told = ",".join(f"{axis}={count}" for axis, count in record["shape"].items())
    assert f"search: takes --shape {told}" in capsys.readouterr().err
    # The recipe repeats the run without another search.
    saved = read_recipe(run / "recipe.yaml")
    assert saved["shape"] == record["shape"]
    assert (saved["ratio"], saved["speedup"], saved["search_minutes"]) == (None, None, 0)
    # Shapes are compared by their way to the dense model, and the run keeps the loss that it was asked for.
    assert set(weights) == {1.0}
    assert saved["distillation_weight"] == 0.25
    assert export_run(run, tmp_path / "out", dtype="float32").parity is not None
    # Asked for again, the run is finished, and is not searched for a second time.
    assert start_or_resume(asked(base, rows, **target), run) is None
    other = {name: value + 0.05 for name, value in target.items() if value}
    for changed, named in [
        (other, rf"the search that the run began with: {next(iter(other))} .*, found {next(iter(other.values()))}"),
        ({"search_minutes": 0.7}, r"minutes 0\.5, found 0\.7"),
        ({"axes": "layers,ffn"}, r"axes \[\], found \['ffn', 'layers'\]"),
    ]:
        with pytest.raises(UsageError, match=named):
            start_or_resume(asked(base, rows, **{**target, **changed}), run)
    with pytest.raises(UsageError, match="settings that the run began with"):
        start_or_resume(asked(base, rows, **target, seed=3), run)
    # A record of the time before `--speedup` has neither a speed nor axes.
    older = {name: value for name, value in record.items() if name not in ("speedup", "axes")}
    (run / SEARCH_FILE).write_text(json.dumps(older))
    if target["ratio"]:
        assert start_or_resume(asked(base, rows, **target), run) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "layers=6", "ratio": None}, "no shape and no hidden_size"),
        ({"hidden_size": 48, "ratio": None}, "no shape and no hidden_size"),
        ({"method": "pat"}, "no method beside it"),
        (
            {"speedup": 1.3},
            r"expected settings that go together \(give ratio or speedup, not both\), found ratio 0.25, ",
        ),
        ({**SPEED, "shape": "layers=6"}, "speedup looks for a shape"),
        ({**SPEED, "hidden_size": 48}, "speedup looks for a shape"),
        ({**SPEED, "method": "cut"}, "the shape that speedup finds decides the method"),
        ({**SPEED, "quantize_base": "nf4"}, "no speedup beside quantize_base"),
        ({"quantize_base": "nf4"}, "no search_minutes beside quantize_base"),
        ({"streaming": True}, "search_minutes without streaming"),
    ],
)
def test_what_leaves_nothing_to_look_for(settings: dict[str, Any], message: str, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        asked(tmp_path, rows, **settings)


def test_a_search_goes_along_the_axes_that_are_named(rows: Path, tmp_path: Path):
    """A default number of calibration rows takes what there is, as without a search."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:10]))
    run = tmp_path / "run"
    settings = {
        "axes": "layers,ffn",
        "choose": "layers=last",
        "dtype": "bfloat16",
        "train": "all",
        "search_minutes": 0.2,
    }
    left = {name: value for name, value in SETTINGS.items() if name not in ("calibration_rows", "lora_rank", "dtype")}
    recipe = {"model": str(wide_base(tmp_path / "base")), "data": str(few), **left, **settings}
    start(TrainRecipe.build(recipe, "test"), run)
    tried = json.loads((run / SEARCH_FILE).read_text())["tried"]
    # On a busy machine there is time for the first shape alone.
    assert {axis for one in tried for axis in one["shape"]} <= {"layers", "ffn"}


@pytest.mark.parametrize("minutes", [0.0, 0.5])
def test_a_speed_that_no_shape_reaches_is_refused_before_anything_is_cut(
    minutes: float, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pat_serve.training.search.bench.assemble", lambda *_, **__: pytest.fail("a model is cut"))
    recipe = asked(wide_base(tmp_path / "base"), rows, ratio=None, speedup=50.0, search_minutes=minutes)
    with pytest.raises(UsageError, match="--speedup: expected a speed that a cut"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_some_candidates_have_no_use_for_is_refused_at_once(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = wide_base(tmp_path / "base")
    monkeypatch.setattr("pat_serve.training.search.bench.assemble", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UsageError, match="--rotate: expected none"):
        start(asked(base, rows, rotate="loss"), tmp_path / "run")
