"""The meaning of a recipe that says little: the defaults, `--preset paper`, and what follows from a tied base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.checks.calibration_rows import require_calibration_rows
from pat_serve.training.checks.continuation import require_same_recipe
from pat_serve.training.checks.steps import LEAST_STEPS, steps_of_epochs, with_accumulation
from pat_serve.training.config import TrainRecipe
from pat_serve.training.presets import PAPER, preset_settings
from pat_serve.training.run import resume, start, start_or_resume
from tests.conftest import tiny_recipe
from tests.test_resume import interrupt
from tests.tiny_models import save_tiny_llama

DEFAULTS = {name: TrainRecipe.model_fields[name].default for name in (*PAPER, "hio_rank")}


def recipe(**settings: Any) -> TrainRecipe:
    return TrainRecipe.build({"model": "m", "data": "d"} | settings, "flags")


@pytest.mark.parametrize(
    ("settings", "tied", "expected"),
    [
        ({}, False, ("loss", "energy", "cut", True, True)),
        ({}, True, ("loss", "energy", "cut", True, False)),
        ({"max_steps": 0}, False, ("energy", "energy", "cut", True, True)),
        ({"max_steps": 0, "mask_start": "zero"}, False, ("none", "zero", "anneal", False, False)),
        ({"max_steps": 0, "rotate": "loss"}, True, ("loss", "energy", "cut", True, False)),
        ({"max_steps": 1}, False, ("loss", "energy", "cut", True, True)),
        ({"tied_embeddings": "keep"}, True, ("loss", "energy", "cut", True, False)),
        ({"tied_embeddings": "keep", "rotate": "none"}, True, ("none", "energy", "cut", True, False)),
        ({"tied_embeddings": "untie"}, True, ("loss", "energy", "cut", True, True)),
        ({"rotate": "energy"}, True, ("energy", "energy", "cut", True, False)),
        ({"mask_start": "gradient"}, False, ("none", "gradient", "anneal", False, False)),
        ({"mask_start": "zero"}, False, ("none", "zero", "anneal", False, False)),
        ({"mask_start": "zero", "rotate": "loss"}, False, ("loss", "zero", "anneal", False, True)),
        ({"quantize_base": "nf4", "gate": "cut"}, False, ("none", "energy", "cut", False, False)),
        ({"quantize_base": "nf4"}, False, ("none", "energy", "anneal", False, False)),
        ({"gate": "gradual"}, False, ("loss", "energy", "gradual", False, True)),
        (PAPER, False, ("none", "zero", "anneal", False, False)),
    ],
)
def test_what_is_left_open_follows_from_the_rest(
    settings: dict[str, Any], tied: bool, expected: tuple[object, ...]
) -> None:
    decided = recipe(**settings).resolved(tied=tied)
    found = (decided.rotate, decided.mask_start, decided.gate, decided.compensate, decided.lora_head)
    assert found == expected
    assert decided.resolved(tied=tied) == decided


@pytest.mark.parametrize(
    ("hidden_size", "settings", "rate"),
    [
        (64, {}, 1.3e-3),
        (576, {}, 1.3e-3),
        (2048, {}, 4.9e-4),
        (4096, {}, 2.9e-4),
        (576, {"train": "all"}, 2e-4),
        (4096, {"train": "all"}, 4.3e-5),
        (576, {"method": "layers"}, 2e-4),
        (576, {"learning_rate": 1e-5}, 1e-5),
        (576, preset_settings("paper"), 5e-5),
        (576, {"method": "spp"}, 4e-3),
    ],
)
def test_the_learning_rate_follows_from_the_width(hidden_size: int, settings: dict[str, Any], rate: float) -> None:
    assert recipe(**settings).with_rate(hidden_size).learning_rate == rate


@pytest.mark.parametrize(
    ("settings", "rows", "processes", "micro_batches"),
    [
        ({}, 100_000, 1, 16),
        ({"epochs": 1}, 200 * 128, 1, 16),
        ({"epochs": 1}, 199 * 128, 1, 8),
        ({}, 2320, 1, 4),
        ({}, 2320, 4, 1),
        ({"batch_size": 2}, 2320, 1, 16),
        ({}, 24, 1, 1),
        ({"max_steps": 5}, 24, 1, 16),
        ({}, None, 1, 16),
        ({"gradient_accumulation_steps": 3}, 24, 1, 3),
        (preset_settings("paper"), 24, 1, 16),
        ({"method": "one-shot"}, 24, 1, None),
    ],
)
def test_a_run_of_few_rows_takes_small_steps(
    settings: dict[str, Any], rows: int | None, processes: int, micro_batches: int | None
) -> None:
    found = with_accumulation(recipe(**settings), rows, processes)
    assert found.gradient_accumulation_steps == micro_batches
    if micro_batches in (8, 4) and rows is not None:
        more = steps_of_epochs(found, rows, processes, micro_batches * 2)
        assert more < LEAST_STEPS <= steps_of_epochs(found, rows, processes, micro_batches)


@pytest.mark.parametrize("before", [None, 16])
def test_a_run_says_how_large_its_steps_are_and_goes_on_with_them(
    before: int | None, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = tiny_recipe(tiny_base, rows, max_steps=None, epochs=12).model_copy(
        update={"gradient_accumulation_steps": None}
    )
    interrupt(run, asked.model_copy(update={"gradient_accumulation_steps": before}), 1)
    taken = yaml.safe_load((run / "recipe.yaml").read_text())["gradient_accumulation_steps"]
    assert taken == (before or 1)
    finished = start_or_resume(asked, run)
    assert finished is not None
    assert finished.steps == steps_of_epochs(asked, len(rows.read_text().splitlines()), 1, taken)


@pytest.mark.parametrize("before", [None, 2e-4])
def test_a_run_says_the_learning_rate_that_it_took_and_goes_on_with_it(
    before: float | None, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """`before` is the default of an older version, which the run has written down."""
    run = tmp_path / "run"
    asked = tiny_recipe(tiny_base, rows, max_steps=12).model_copy(update={"learning_rate": None})
    begun = asked.model_copy(update={"learning_rate": before})
    interrupt(run, begun, 5)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learning_rate"] == (before or 1.3e-3)
    assert start_or_resume(asked, run) is not None
    assert start_or_resume(asked, run) is None
    with pytest.raises(UsageError, match="learning_rate"):
        start_or_resume(asked.model_copy(update={"learning_rate": 1e-5}), run)


@pytest.mark.parametrize(
    ("settings", "refit"),
    [
        ({}, "full"),
        ({"refit": "lora"}, "lora"),
        ({"distillation_weight": 0.5}, "full"),
        ({"compensate": False}, "auto"),
        ({"quantize_base": "nf4", "gate": "cut"}, "auto"),
        (PAPER, "auto"),
    ],
)
def test_weights_make_up_for_a_cut(settings: dict[str, Any], refit: str) -> None:
    assert recipe(**settings).resolved(tied=False).refit == refit
    inner = {name: value for name, value in settings.items() if name in ("refit", "compensate")}
    if inner == settings:
        assert recipe(shape="layers=3", **inner).resolved(tied=False, narrows=False).refit == refit


def test_dense_baseline_is_plain_lora() -> None:
    decided = recipe(method="lora").resolved(tied=False, prunes=False)
    assert (decided.rotate, decided.compensate, decided.lora_head) == ("none", False, False)
    assert recipe(method="lora", lora_head=True).resolved(tied=False, prunes=False).lora_head


def test_a_choice_that_the_rest_rules_out_is_refused() -> None:
    with pytest.raises(UsageError, match="gate cut"):
        recipe(compensate=True, mask_start="zero").resolved(tied=False)


def test_a_run_with_the_former_number_of_rows_goes_on(tmp_path: Path) -> None:
    former = recipe(calibration_rows=128)
    former.save(tmp_path)
    require_same_recipe(tmp_path, recipe())
    with pytest.raises(UsageError, match="calibration_rows 128, found 64"):
        require_same_recipe(tmp_path, recipe(calibration_rows=64))


def test_calibration_rows_need_something_to_measure_for() -> None:
    assert recipe(calibration_rows=512).resolved(tied=False).calibration_rows == 512
    with pytest.raises(UsageError, match=r"^--calibration-rows: expected a recipe that measures"):
        recipe(calibration_rows=512, **PAPER).resolved(tied=False)
    # Runs of earlier versions have the former default in their recipes.
    assert recipe(calibration_rows=128, **PAPER).resolved(tied=False).calibration_rows == 128
    assert recipe(calibration_rows=128, method="lora").resolved(tied=False, prunes=False).calibration_rows == 128
    require_calibration_rows(recipe(calibration_rows=128), 50)
    with pytest.raises(UsageError, match=r"^--calibration-rows: expected none"):
        recipe(calibration_rows=512, method="lora").resolved(tied=False, prunes=False)
    with pytest.raises(UsageError, match="calibration_rows"):
        recipe(calibration_rows=7)


def test_operator_has_a_rank_where_the_mask_is_trained() -> None:
    assert recipe().resolved(tied=False).resolved_hio_rank(4096) == 0
    assert recipe(**PAPER).resolved(tied=False).resolved_hio_rank(4096) == 200
    assert recipe(hio_rank=64).resolved(tied=False).resolved_hio_rank(4096) == 64
    assert recipe(hio_rank="64").resolved(tied=False).resolved_hio_rank(4096) == 64


def test_an_automatic_rank_is_the_default_in_words() -> None:
    assert recipe(hio_rank="auto") == recipe()
    assert recipe(hio_rank="auto", **PAPER).resolved(tied=False).resolved_hio_rank(256) == 8
    with pytest.raises(UsageError, match="hio_rank"):
        recipe(hio_rank="most")
    with pytest.raises(UsageError, match="hio_rank"):
        recipe(hio_rank=-1)


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="default or paper"):
        preset_settings("best")


def test_the_old_name_of_the_preset_still_works_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert preset_settings(None, "paper") == preset_settings("paper")
    assert preset_settings("paper", "paper", "PatConfig.preset") == preset_settings("paper")
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "--recipe is now called --preset; the old name still works.",
        "PatConfig.recipe is now called PatConfig.preset; the old name still works.",
    ]
    assert not told.out


def test_default_run_resumes_and_exports(rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Interrupted before its first checkpoint: the adapter must start where it started."""
    settings = tiny_recipe(tiny_base, rows, **DEFAULTS)
    start(settings, tmp_path / "whole")
    start(settings, tmp_path / "run")
    for name in ("plan.json", "plan.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    resume(tmp_path / "run")
    whole, again = PruningPlan.load(tmp_path / "whole"), PruningPlan.load(tmp_path / "run")
    assert whole.rotation is not None
    assert whole.adapter == again.adapter
    assert whole.cuts["hidden"].kept.equal(again.cuts["hidden"].kept)
    exported = export_run(tmp_path / "run", tmp_path / "pruned")
    assert exported.parity is not None
    assert exported.parity.max_abs_over_std < 1e-4


def test_force_measures_anew(rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    """A replaced run's calibration belongs to the old base."""
    start(tiny_recipe(tiny_base, rows, **DEFAULTS), tmp_path / "run")
    other = save_tiny_llama(tmp_path / "other", seed=7)
    start(tiny_recipe(other, rows, **DEFAULTS), tmp_path / "run", force=True)
    start(tiny_recipe(other, rows, **DEFAULTS), tmp_path / "fresh")
    replaced, fresh = PruningPlan.load(tmp_path / "run"), PruningPlan.load(tmp_path / "fresh")
    assert replaced.rotation is not None
    assert fresh.rotation is not None
    assert replaced.rotation.equal(fresh.rotation)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["rotate"] == "auto"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotate", "energy"),
        ("gate", "cut"),
        ("hio_rank", 8),
        ("mask_learning_rate", 0.1),
        ("identity_weight", 0.5),
        ("narrow", "off"),
    ],
)
def test_a_method_that_prunes_nothing_takes_no_setting_of_pruning(name: str, value: object) -> None:
    asked = recipe(method="lora", **{name: value})
    with pytest.raises(UsageError, match=f"--{name.replace(chr(95), chr(45))}: expected none, since --method lora"):
        asked.resolved(tied=False, prunes=False)
    recipe(method="lora", **PAPER).resolved(tied=False, prunes=False)
