"""`--method one-shot`: zeros of a pattern in a stock checkpoint that was proved, layer by layer and resumable."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.pattern import Pattern
from pat_serve.errors import BrokenPlan, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PLAN_ARRAYS, PLAN_JSON, PruningPlan
from pat_serve.server.bench.model_source import resolve
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.one_shot import OneShotSettings
from pat_serve.training.run import resume, start
from pat_serve.training.sparse.layers import Layers
from pat_serve.training.sparse.walk import prune_layers
from tests.tiny_models import save_tiny_family

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def recipe(base: Path, rows: Path, **settings: object) -> TrainRecipe:
    common = {"calibration_rows": 8, "batch_size": 4, "dtype": "float32"}
    return TrainRecipe(method="one-shot", model=str(base), data=str(rows), settings=settings, **common)


@pytest.fixture(scope="module")
def pruned(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one_shot") / "run"
    start(recipe(tiny_base, rows, pattern="2:4"), run)
    return run


def test_an_export_has_the_zeros_and_passes_the_gate(pruned: Path, tiny_base: Path, tmp_path: Path):
    exported = export_run(pruned, tmp_path / "sparse")
    assert exported.parity is not None
    assert exported.parity.passed
    sparsity = exported.record["sparsity"]
    assert (sparsity["pattern"], sparsity["modules"]) == ("2:4", 14)
    assert sparsity["zeros"] * 2 == sparsity["numbers"]
    with safe_open(tmp_path / "sparse/model.safetensors", framework="pt") as file:
        for name in LINEARS:
            weight = file.get_tensor(f"model.layers.1.{name}.weight")
            assert Pattern.parse("2:4").held_by(weight)
            assert not Pattern.parse("1:4").held_by(weight)
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert "sparsity_config" not in json.dumps(config)
    assert "quantization_config" not in config
    card = (tmp_path / "sparse/README.md").read_text()
    assert "50.0% of the numbers in 14 linears are zero (pattern 2:4)" in card
    assert "neither smaller nor faster" in card
    assert "Pruning-Aware Tuning" not in card


def test_a_benchmark_says_that_zeros_bring_no_speed(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export_run(pruned, tmp_path / "sparse", parity=False)
    resolve(str(tmp_path / "sparse"), flag="--candidate", load_format="auto", layers=None, scratch=tmp_path)
    assert "50.0% of its linears' numbers are zero" in capsys.readouterr().err


def test_a_plan_that_promises_other_zeros_is_refused(pruned: Path, tmp_path: Path):
    run = shutil.copytree(pruned, tmp_path / "run")
    replace(PruningPlan.load(run), sparsity={"model.layers.0.mlp.up_proj": "1:4"}).save(run)
    with pytest.raises(BrokenPlan, match=r"zeros of pattern 1:4 in model\.layers\.0\.mlp\.up_proj"):
        export_run(run, tmp_path / "out")
    replace(PruningPlan.load(run), sparsity={"model.layers.9.mlp.up_proj": "2:4"}).save(run)
    with pytest.raises(BrokenPlan, match=r"linears in layers that stay, found 2:4 for 'model\.layers\.9"):
        export_run(run, tmp_path / "out")


def test_a_resumed_run_has_the_same_bytes(pruned: Path, tmp_path: Path):
    run = shutil.copytree(pruned, tmp_path / "run")
    for name in (PLAN_JSON, PLAN_ARRAYS, "weights/layer-00001.safetensors"):
        (run / name).unlink()
    first = (run / "weights/layer-00000.safetensors").stat().st_mtime_ns
    resume(run)
    assert (run / "weights/layer-00000.safetensors").stat().st_mtime_ns == first
    for name in (PLAN_JSON, "metrics.jsonl", "weights/layer-00001.safetensors"):
        assert (run / name).read_bytes() == (pruned / name).read_bytes(), name


def test_each_layer_is_pruned_on_what_the_pruned_ones_before_it_give(tiny_base: Path, rows: Path, tmp_path: Path):
    """A layer's weights depend on the zeros before it; those of the first layer do not depend on later ones."""
    for sparsity in (0.1, 0.6):
        start(recipe(tiny_base, rows, sparsity=sparsity, mask="wanda", compensation="M"), tmp_path / f"{sparsity}")
    lines = [json.loads(line) for line in (tmp_path / "0.6/metrics.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == [0, 1]
    assert all(line["zeros"] == pytest.approx(0.6, abs=0.01) for line in lines)
    mild = [json.loads(line) for line in (tmp_path / "0.1/metrics.jsonl").read_text().splitlines()]
    for low, high in zip(mild, lines, strict=True):
        for name, figures in low["linears"].items():
            assert 0 < figures["relative_error"] < high["linears"][name]["relative_error"] < 1


def test_one_layer_is_in_memory_at_a_time(tiny_base: Path):
    checkpoint = open_checkpoint(str(tiny_base))
    layers = Layers(checkpoint, torch.float32, torch.device("cpu"))
    ids = torch.arange(3, 19).view(2, 8)
    streams = layers.enter([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])

    def loaded() -> set[str]:
        return {name for name, one in layers.model.named_parameters() if not one.is_meta}

    assert loaded() == set()
    how = [OneShotSettings(pattern="2:4").zeroing(0.5)] * 2
    for number, _ in prune_layers(layers, checkpoint.family, 2, streams, how, {}):
        assert loaded() == set(), number
        with layers.layer(number):
            assert {name.split(".")[2] for name in loaded()} == {str(number)}


def test_alpha_gives_layers_different_shares(tiny_base: Path, rows: Path, tmp_path: Path):
    own = {"sparsity": 0.5, "allocation": "alpha", "mask": "magnitude", "compensation": "none", "refine": "dsnot"}
    start(recipe(tiny_base, rows, **own), tmp_path / "run")
    zeros = [json.loads(line)["zeros"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # The spread of magnitudes is 0.5, so of two layers one gets 0.25 and the other 0.75.
    assert sorted(zeros) == pytest.approx([0.25, 0.75], abs=0.01)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "phi3"])
def test_other_families_go_the_same_way(model_type: str, rows: Path, tmp_path: Path):
    overrides = {"head_dim": 32} if model_type != "phi3" else {}
    base = save_tiny_family(tmp_path / "base", model_type, **overrides)
    start(recipe(base, rows, sparsity=0.5), tmp_path / "run")
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert exported.parity is not None
    assert exported.parity.passed
    sparsity = exported.record["sparsity"]
    assert sparsity["zeros"] / sparsity["numbers"] == pytest.approx(0.5, abs=0.01)


def test_the_weights_keep_the_dtype_of_the_base(rows: Path, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", dtype=torch.bfloat16, head_dim=32)
    start(recipe(base, rows), tmp_path / "run")
    with safe_open(tmp_path / "run/weights/layer-00000.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # cannot be iterated
    assert dtypes == {torch.bfloat16}
    assert open_checkpoint(str(export_run(tmp_path / "run", tmp_path / "out").out)).dtype == torch.bfloat16


def test_a_computation_in_another_dtype_rounds_no_weight(tiny_base: Path, rows: Path, tmp_path: Path):
    """The entries that stay have the base's values, where nothing makes up for the rest."""
    given = recipe(tiny_base, rows, mask="magnitude", compensation="none").model_copy(update={"dtype": "bfloat16"})
    start(given, tmp_path / "run")
    name = "model.layers.1.mlp.up_proj.weight"
    dense = open_checkpoint(str(tiny_base)).read(name)
    with safe_open(tmp_path / "run/weights/layer-00001.safetensors", framework="pt") as file:
        sparse = file.get_tensor(name)
    assert sparse[sparse != 0].equal(dense[sparse != 0])
    assert (sparse != 0).double().mean() == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.95}, "--sparsity: expected less than 0.95, found 0.95"),
        ({"sparsity": 0}, "--sparsity: expected greater than 0, found 0"),
        ({"pattern": "4:2"}, "--pattern: expected unstructured, or N:M with N entries kept of M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "no sparsity beside pattern 2:4, whose share of zeros is 0.5"),
        ({"pattern": "2:4", "allocation": "alpha"}, "allocation uniform: pattern 2:4"),
        ({"mask": "M"}, "mask S: mask M tries all sets of a group"),
        ({"mask": "L"}, "--mask: expected 'magnitude', 'wanda', 'S' or 'M', found L"),
        ({"spread": 0.3}, "no spread without allocation alpha"),
        ({"hio_rank": 8}, "--hio-rank: expected a setting of --method one-shot: sparsity, .* found hio_rank"),
    ],
)
def test_settings_that_do_not_go_are_refused(settings: dict, message: str, tiny_base: Path, rows: Path):
    with pytest.raises(UsageError, match=message):
        recipe(tiny_base, rows, **settings)


def test_what_does_not_fit_the_base_or_the_data_is_refused_before_any_work(tiny_base: Path, rows: Path, tmp_path: Path):
    def refuse(given: TrainRecipe, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            start(given, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refuse(
        recipe(tiny_base, rows, pattern="3:6"), r"an M that divides the \d+ inputs of model\.layers\.0\..* found 3:6"
    )
    few = recipe(tiny_base, rows).model_copy(update={"calibration_rows": 100_000})
    refuse(few, "--calibration-rows: expected at most .*, found 100000")
    trained = recipe(tiny_base, rows).model_copy(update={"epochs": 1.0})
    refuse(trained, "--epochs: expected none, since --method one-shot trains nothing, found 1.0")
    cut = recipe(tiny_base, rows).model_copy(update={"hidden_size": 32})
    refuse(cut, "--hidden-size: expected none, since --method one-shot cuts nothing")


def test_a_default_wants_the_rows_that_the_method_was_published_with(tiny_base: Path, rows: Path, tmp_path: Path):
    default = recipe(tiny_base, rows).model_copy(update={"calibration_rows": None})
    with pytest.raises(UsageError, match=r"--calibration-rows: expected at most 64, .*, found 128"):
        start(default, tmp_path / "run")


def test_data_of_less_than_the_least_rows_are_told_so(tiny_base: Path, rows: Path, tmp_path: Path):
    """The way out once was a number of rows that the flag itself refuses."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UsageError, match=r"--calibration-rows: .*Give data with at least 8 rows"):
        start(recipe(tiny_base, few), tmp_path / "run")


def test_alpha_takes_a_base_with_a_linear_of_zeros(rows: Path, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=2)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    start(recipe(base, rows, allocation="alpha", sparsity=0.6), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(line["zeros"] for line in lines) / 2 == pytest.approx(0.6, abs=0.02)


def test_a_run_that_was_killed_between_a_layers_two_files_resumes_to_the_same_bytes(pruned: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(pruned, run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # The layer's line was written, and its weights not yet.
    for name in (PLAN_JSON, PLAN_ARRAYS, "weights/layer-00001.safetensors"):
        (run / name).unlink()
    resume(run)
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
