"""The search among cuts: its refits, its distance to the dense model, its candidates, and a run to a stock model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.axes import AXES
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.shapes.candidates import axis_grid
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.search.evolution import Scores, evolve
from pat_serve.training.methods.search.genome import Breeder, Genome, shapes_alike
from pat_serve.training.methods.search.method import Search
from pat_serve.training.methods.search.refits import Refits, refit_columns, removal_errors
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

PLAIN = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "lora_head": None, "hio_rank": None,
         "compensate": None}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=6)


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 380, (2, 6, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[:, 2, 15:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


def admm(weight_OI: Tensor, second_II: Tensor, mask_I: Tensor, steps: int) -> Tensor:
    """The paper's refit: W and its masked copy Z are drawn together; `mask_I` is 1 for what stays."""
    eye = torch.eye(len(second_II), dtype=torch.float64)
    rho = float(second_II.diagonal().mean())
    target, factor = second_II @ weight_OI.T, torch.linalg.inv(second_II + rho * eye)
    w_IO, u_IO = weight_OI.T.clone(), torch.zeros_like(weight_OI.T)
    for _ in range(steps):
        z_IO = (w_IO + u_IO) * mask_I[:, None]
        u_IO = u_IO + w_IO - z_IO
        w_IO = factor @ (target + rho * (z_IO - u_IO))
    return ((w_IO + u_IO) * mask_I[:, None]).T


def test_the_refit_is_what_the_admm_comes_to() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(10, 10, dtype=torch.float64, generator=generator)
    z_NI = torch.randn(200, 10, dtype=torch.float64, generator=generator) @ mix
    weight, second = torch.randn(4, 10, dtype=torch.float64, generator=generator), z_NI.T @ z_NI
    kept = torch.tensor([0, 2, 3, 5, 8, 9])
    mask = torch.zeros(10, dtype=torch.float64).index_fill_(0, kept, 1.0)
    found = refit_columns(weight, second, kept)
    many = admm(weight, second, mask, 4000)[:, kept]
    assert float((found - many).norm() / many.norm()) < 0.02

    def error(weights: Tensor) -> float:
        return float((z_NI @ weight.T - z_NI[:, kept] @ weights.T).norm())

    # Nearer after more steps, and always above the solution.
    few = admm(weight, second, mask, 20)[:, kept]
    assert error(found) <= error(many) * 1.001 < error(few) * 1.001 < error(weight[:, kept])


def test_loaded_weights_are_refits_and_go_again(base: Path) -> None:
    checkpoint = open_checkpoint(str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refits = Refits(model, checkpoint.family, checkpoint.sizes, ["ffn", "kv_groups"], batches())
    scores = {line: removal_errors(refits.inputs(line)) for line in refits.writers}
    assert {line: len(score) for line, score in scores.items()} == {
        **{f"ffn.{i}": 128 for i in range(6)}, **{f"kv_groups.{i}": 2 for i in range(6)},
    }  # fmt: skip
    breeder = Breeder(checkpoint.sizes, scores, [{"ffn": 96, "kv_groups": 1}], 0)
    refits.load(breeder.first({"ffn": 96, "kv_groups": 1}))
    down = model.get_submodule("model.layers.3.mlp.down_proj").weight
    assert int((down.abs().sum(0) == 0).sum()) == 32
    assert not torch.equal(
        down[:, down.abs().sum(0) > 0], before["model.layers.3.mlp.down_proj.weight"][:, down.abs().sum(0) > 0]
    )
    refits.load(None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_children_are_legal_and_seeded(base: Path) -> None:
    sizes = open_checkpoint(str(base)).sizes
    family = open_checkpoint(str(base)).family
    asked = {"layers": 5, "ffn": 104}
    grids = {axis: axis_grid(axis, sizes, family) for axis in asked}
    shapes = shapes_alike(sizes, asked, grids, tolerance=0.05, of_the_cut=1.0)
    assert asked in shapes
    assert len(shapes) > 1
    wanted = sizes.with_counts(asked).parameters
    assert all(abs(sizes.with_counts(shape).parameters / wanted - 1) <= 0.05 for shape in shapes)
    scores = {"layers": torch.arange(6.0) + 1, **{f"ffn.{i}": torch.rand(128) + 0.1 for i in range(6)}}

    def line(seed: int) -> list[Genome]:
        breeder = Breeder(sizes, scores, shapes, seed)
        found = [breeder.first(asked)]
        for _ in range(40):
            found.append(breeder.child(found[-1]))
        return found

    found = line(3)
    assert found == line(3) != line(4)
    assert found[0].of("layers") == (1, 2, 3, 4, 5)
    assert len({genome.counts for genome in found}) > 1
    for genome in found:
        counts = dict(genome.counts)
        for name, kept in genome.kept:
            assert len(kept) == counts[name.partition(".")[0]]
            assert list(kept) == sorted(set(kept))
        assert ("layers" in counts) == (genome.of("layers") is not None)
        assert ("ffn" in counts) == (genome.of("ffn.0") is not None)


def test_a_winner_beats_its_parent_on_the_most_rows() -> None:
    def number(value: int) -> Genome:
        return Genome((("layers", value),), ())

    # On the first batch of rows a larger number is better, on both of them 7 is best.
    asked: list[tuple[int, int]] = []

    def measure(genome: Genome, at: int) -> tuple[float, int]:
        value = genome.counts[0][1]
        asked.append((value, at))
        return (20.0 - value, 1) if at == 0 else (abs(value - 7) * 10.0, 1)

    draws = iter([1, 2, 3, 4, 30, 5, 6, 7, 7, 8, 9, 10])
    scores = Scores(measure=measure)
    winners: list[int] = []
    best = evolve(
        number(0),
        lambda _: number(next(draws)),
        scores,
        generations=3,
        offspring=4,
        rounds=[1, 2],
        told=lambda _, genome, __: winners.append(genome.counts[0][1]),
    )
    # 30 comes furthest in its first round and falls behind the parent in the second.
    assert winners == [4, 4, 10]
    assert best == number(10)
    # Nothing is measured twice.
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_run_from_search_to_a_stock_model(fixed: bool, base: Path, rows: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"generations": 3, "offspring": 4, "fixed_shape": fixed}
    recipe = tiny_recipe(base, rows, shape={"layers": 5, "ffn": 104}, method="search", settings=settings, max_steps=2,
                         save_steps=1, calibration_rows=8, **PLAIN)  # fmt: skip
    finished = start(recipe, run)
    plan, sizes = PruningPlan.load(run), open_checkpoint(str(base)).sizes
    counts = plan.cuts.counts(sizes)
    assert finished.shape == counts
    if fixed:
        assert counts == {"hidden": 64, "layers": 5, "ffn": 104}
    wanted = sizes.with_counts({"layers": 5, "ffn": 104}).parameters
    assert sizes.with_counts(counts).parameters == pytest.approx(wanted, rel=0.011)
    results = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    before = {path: path.read_bytes() for path in results}
    (run / "plan.json").unlink()
    (run / "checkpoints/step-2").rename(tmp_path / "gone")
    resume(run)
    assert {path: path.read_bytes() for path in results} == before
    export_run(run, tmp_path / "pruned")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert cut.config.num_hidden_layers == counts.get("layers", 6)
    assert load_file(tmp_path / "pruned/model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape[
        1
    ] == counts.get("ffn", 128)


@pytest.mark.parametrize("ends_in", ["search", "first weights"])
def test_an_interrupted_search_measures_nothing_twice(
    ends_in: str, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(base, rows, shape={"layers": 5, "ffn": 104}, method="search", max_steps=1,
                         settings={"generations": 3, "offspring": 4}, calibration_rows=8, **PLAIN)  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(recipe, whole)
    with monkeypatch.context() as patched:
        if ends_in == "search":
            loaded, load = [0], Refits.load

            def few(self: Refits, genome: Genome | None) -> None:
                loaded[0] += genome is not None
                if loaded[0] == 7:
                    raise KeyboardInterrupt
                load(self, genome)

            patched.setattr(Refits, "load", few)
        else:
            # The first file of weights is there, and what follows it is not.
            patched.setattr("pat_serve.training.start.save_choice", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(recipe, run)
    before = (run / "search.jsonl").read_text().splitlines()
    with (run / "search.jsonl").open("ab") as file:
        file.write({"search": b'{"candidate": "cut o', "first weights": b'[1]\n{"candidate": "x\n\xff\xfe{"'}[ends_in])
    resume(run)
    lines = (run / "search.jsonl").read_text().splitlines()
    assert lines[: len(before)] == before
    assert len(before) == 6 if ends_in == "search" else lines == before
    assert lines == (whole / "search.jsonl").read_text().splitlines()
    results = [path.relative_to(whole) for path in whole.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert all((run / path).read_bytes() == (whole / path).read_bytes() for path in results)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_search_is_nearer_to_the_dense_model_than_its_start(base: Path) -> None:
    given = {"model": str(base), "data": "d", "method": "search", "shape": {"layers": 4, "ffn": 96},
             "settings": {"generations": 4, "offspring": 8, "fixed_shape": True}}  # fmt: skip
    recipe = TrainRecipe(**given).resolved(tied=False, narrows=False)
    checkpoint = open_checkpoint(str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = recipe.model_copy(update={"settings": {**recipe.settings, "generations": 1, "offspring": 1}})
    found = [Search.choose(one, model, checkpoint.family, {"hidden": 64, **given["shape"]}, batches())
             for one in (recipe, recipe, first)]  # fmt: skip
    assert all(torch.equal(kept, found[1][line]) for line, kept in found[0].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(kept, found[2][line]) for line, kept in found[0].items())


@pytest.mark.parametrize("asked", [{"ffn": 120}, {"layers": 5, "ffn": 120}, {"ffn": 64, "kv_groups": 1}])
def test_a_search_keeps_cutting_every_axis_that_was_asked_for(asked: dict[str, int], base: Path) -> None:
    """A cut of less than the tolerance once left the dense model among the shapes, and it won."""
    checkpoint = open_checkpoint(str(base))
    sizes, family = checkpoint.sizes, checkpoint.family
    grids = {axis: axis_grid(axis, sizes, family, 2) for axis in asked}
    shapes = shapes_alike(sizes, asked, grids, tolerance=0.5)
    assert asked in shapes
    whole = {axis: AXES[axis].length(sizes) for axis in asked}
    assert all(shape[axis] < whole[axis] for shape in shapes for axis in asked)
    cut = sizes.parameters - sizes.with_counts(asked).parameters
    assert all(sizes.parameters - sizes.with_counts(shape).parameters >= 0.96 * cut for shape in shapes)


def test_a_search_takes_no_choices(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--choose: expected none, since --method search searches for it"):
        start(
            tiny_recipe(base, rows, method="search", shape={"ffn": 96}, choose={"ffn": "obs"}, **PLAIN),
            tmp_path / "run",
        )
