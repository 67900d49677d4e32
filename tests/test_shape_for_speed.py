"""The shape that a run for a speed takes without a search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.machine.probed_costs import FoundCosts, fitted_costs
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.shapes.step_cost import StepCosts, decode_work
from pat_serve.training.config import TrainRecipe
from pat_serve.training.recipe_file import overridden, read_recipe
from pat_serve.training.run import start, start_or_resume
from pat_serve.training.search.candidates import ceiling
from pat_serve.training.search.found import SEARCH_FILE
from pat_serve.training.search.speed import expected_speedup, shape_for_speed
from tests.test_search import SPEED, asked, wide_base
from tests.tiny_models import save_tiny_family


def by_fixed_work(base: ModelSizes, share: float) -> Any:
    """Speeds of a machine on which layers' fixed work takes a share of a step, and bytes the rest."""
    return lambda sizes: 1 / (share * sizes.layers / base.layers + (1 - share) / ceiling(base, sizes))


@pytest.mark.parametrize(
    ("share", "settings", "axes"),
    [
        (0.9, {}, {"layers"}),
        (0.0, {}, {"layers", "ffn"}),
        (0.0, {"axes": "hidden,ffn"}, {"hidden", "ffn"}),
        (0.9, {"axes": "layers,ffn"}, {"layers", "ffn"}),
    ],
)
def test_a_speed_alone_takes_the_smaller_cut(
    share: float, settings: dict[str, Any], axes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = save_tiny_family(
        tmp_path / "base", "llama", num_hidden_layers=24, intermediate_size=1024, tie_word_embeddings=True
    )
    sizes = open_checkpoint(str(base)).sizes
    expected = by_fixed_work(sizes, share)
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda base: expected)
    found = shape_for_speed(asked(base, base, **SPEED, **settings))
    assert set(found.shape) == axes
    assert expected(sizes.with_counts(found.shape)) >= 1.3
    for axis, more in {"layers": 1, "ffn": 64}.items():
        if axis in axes and (count := found.shape[axis] + more) < (24 if axis == "layers" else 1024):
            assert expected(sizes.with_counts({**found.shape, axis: count})) < 1.3, "a smaller cut would do"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("wanted", [1.1, 1.2, 1.35, 1.5, 1.9])
def test_nothing_is_cut_that_the_speed_does_not_need(
    share: float, wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = save_tiny_family(
        tmp_path / "base", "llama", num_hidden_layers=24, intermediate_size=1024, tie_word_embeddings=True
    )
    sizes = open_checkpoint(str(base)).sizes
    expected = by_fixed_work(sizes, share)
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda base: expected)
    shape = shape_for_speed(asked(base, base, **{**SPEED, "speedup": wanted})).shape
    for axis in shape:
        left = {one: count for one, count in shape.items() if one != axis}
        assert expected(sizes.with_counts(left)) < wanted, f"{shape} without a cut of {axis}"


def test_a_run_for_a_speed_needs_no_search(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base, run = wide_base(tmp_path / "base"), tmp_path / "run"
    sizes = open_checkpoint(str(base)).sizes
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda _: by_fixed_work(sizes, 0.9))
    recipe = asked(base, rows, **SPEED)
    assert start(recipe, run).shape == {"hidden": 64, "layers": 6}
    told = capsys.readouterr().err
    assert "--speedup 1.3 takes --shape layers=6: expected to decode 1.3" in told
    assert "--speedup 1.3 could take --shape layers=6,ffn=" in told
    saved = read_recipe(run / "recipe.yaml")
    assert (saved["shape"], saved["speedup"], saved["method"]) == ({"layers": 6}, None, "cut")
    record = json.loads((run / SEARCH_FILE).read_text())
    assert (record["speedup"], record["minutes"], record["tried"]) == (1.3, 0, [])
    # A machine whose probe says something else by then does not change the run.
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda _: pytest.fail("probes again"))
    assert start_or_resume(recipe, run) is None
    with pytest.raises(UsageError, match=r"speedup 1\.3, found 1\.4"):
        start_or_resume(asked(base, rows, **{**SPEED, "speedup": 1.4}), run)
    with pytest.raises(UsageError, match=r"minutes 0\.0, found 0\.5"):
        start_or_resume(asked(base, rows, **{**SPEED, "search_minutes": 0.5}), run)


@pytest.mark.parametrize(("layers", "axes"), [(7, {"ffn"}), (8, {"layers"})])
def test_a_base_of_few_layers_keeps_them(layers: int, axes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=layers, intermediate_size=2048)
    sizes = open_checkpoint(str(base)).sizes
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda _: by_fixed_work(sizes, 0.4))
    recipe = asked(base, base, **{**SPEED, "speedup": 1.1})
    assert set(shape_for_speed(recipe).shape) == axes
    with pytest.raises(UsageError, match="60 % of ffn is" if layers == 7 else "60 % of layers or layers and ffn is"):
        shape_for_speed(recipe.model_copy(update={"speedup": 50.0}))


def test_a_choice_may_be_of_any_axis_that_is_found(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = wide_base(tmp_path / "base")
    sizes = open_checkpoint(str(base)).sizes
    monkeypatch.setattr("pat_serve.training.search.speed.expected_speedup", lambda _: by_fixed_work(sizes, 0.9))
    start(asked(base, rows, **SPEED, choose="layers=last,ffn=energy", max_steps=0), tmp_path / "run")
    assert read_recipe(tmp_path / "run/recipe.yaml")["choose"] == {"layers": "last"}
    with pytest.raises(UsageError, match="layers=influence or"):
        asked(base, rows, **SPEED, choose="layers=luck")


def test_a_flag_wins_over_the_files_other_way_to_say_what_is_cut():
    fields = TrainRecipe.model_fields
    assert overridden({"ratio": 0.25, "axes": ["ffn"]}, {"speedup": 1.3}, fields) == {"axes": ["ffn"], "speedup": 1.3}
    for file in ({"speedup": 1.3}, {"speedup": 1.3, "search_minutes": 5.0}):
        assert overridden(file, {"shape": "layers=6"}, fields) == {"shape": "layers=6"}
    assert overridden({"speedup": 1.3, "search_minutes": 5.0}, {"ratio": 0.2}, fields) == {
        "search_minutes": 5.0,
        "ratio": 0.2,
    }


def test_a_probe_that_tells_nothing_leaves_the_ceilings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = ModelSizes(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)
    times = [(decode_work(base, batch_size=1, context_tokens=64, dtype_bytes=2), 1e-3)] * 3

    def tells_nothing(*_: Any) -> FoundCosts:
        return fitted_costs([work for work, _ in times], [second for _, second in times], "a clock", "bfloat16", "")

    monkeypatch.setattr("pat_serve.training.search.speed.probed_costs", tells_nothing)
    shallow = replace(base, layers=24)
    assert expected_speedup(base)(shallow) == ceiling(base, shallow)
    assert "speeds are ceilings" in capsys.readouterr().err


def test_a_disturbed_probe_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    base = ModelSizes(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)
    costs = StepCosts(byte_s=1e-10, flop_s=1e-12, layer_s=1e-5, step_s=1e-4)
    for error, told in [(0.2, ""), (0.5, "The times scatter so much")]:
        found = FoundCosts(costs=costs, source="a clock", dtype="bfloat16", times=9, worst_error=error)
        monkeypatch.setattr("pat_serve.training.search.speed.probed_costs", lambda *_, found=found: found)
        assert expected_speedup(base)(replace(base, layers=15)) > 1.5
        assert (told in capsys.readouterr().err) if told else (capsys.readouterr().err == "")
