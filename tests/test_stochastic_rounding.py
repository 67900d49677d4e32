"""Rounding by chance: what it does to a number, and the updates that nearest values lose and it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pat_serve.errors import ParityError, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.parity.comparison import EXPORTED, LOSSY_PROPORTION, RANDOM, Parity
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.rounding import Rounding
from pat_serve.export.run.reader import open_run
from pat_serve.export.verify import verify_export
from pat_serve.training.run import start
from tests.conftest import tiny_recipe, write_rows
from tests.random_runs import random_run
from tests.tiny_models import save_tiny_llama

PLAIN = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "lora_head": None, "hio_rank": None,
         "compensate": False}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16, num_hidden_layers=4)


@pytest.fixture(scope="module")
def barely_trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps move hardly a number by half a step of bfloat16, and all for the same reason."""
    folder = tmp_path_factory.mktemp("small")
    recipe = tiny_recipe(base, write_rows(folder / "rows.jsonl"), method="cut", shape={"layers": 3}, max_steps=12,
                         learning_rate=1e-4, lora_rank=8, lora_alpha=8.0, calibration_rows=8, **PLAIN)  # fmt: skip
    start(recipe, folder / "run")
    return folder / "run"


def rounded(exact: torch.Tensor, dtype: torch.dtype, name: str = "w") -> torch.Tensor:
    return Rounding(name, dtype, stochastic=True).round(exact)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e-7])
def test_a_number_becomes_a_neighbour_and_keeps_its_mean(scale: float, dtype: torch.dtype, wide: torch.dtype) -> None:
    numbers = scale * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=wide)
    draws = torch.stack([rounded(numbers, dtype, str(seed)) for seed in range(2000)]).to(wide)
    nearest = numbers.to(dtype).to(wide)
    limits = torch.finfo(dtype)
    step = (numbers.abs() * limits.eps).clamp(min=limits.tiny * limits.eps)
    assert bool(((draws - numbers).abs() <= step).all())
    assert bool((draws != nearest).any())
    # Steps are between half and all of that, and the mean of 2,000 draws of half a step has a deviation of 1.1 %.
    assert bool(((draws.mean(0) - numbers).abs() <= 0.06 * step).all())


def test_values_of_the_dtype_stay() -> None:
    limits = torch.finfo(torch.float16)
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, limits.max, limits.min, limits.tiny, 6e-8, torch.inf, -torch.inf])
    exact = values.half().float()
    assert torch.equal(rounded(exact, torch.float16).float(), exact)
    # Beyond the largest value there is nothing to draw.
    assert rounded(torch.tensor([limits.max + 1.0]), torch.float16).item() == limits.max
    assert rounded(torch.tensor([1e6]), torch.float16).item() == torch.inf


def test_draws_go_by_name_and_place_and_not_by_parts() -> None:
    exact = torch.randn(700, 512, generator=torch.Generator().manual_seed(1))
    whole = rounded(exact, torch.bfloat16)
    parts = Rounding("w", torch.bfloat16, stochastic=True)
    assert torch.equal(torch.cat([parts.round(part) for part in torch.split(exact, 33)]), whole)
    assert not torch.equal(rounded(exact, torch.bfloat16, "v"), whole)
    assert torch.equal(Rounding("w", torch.bfloat16, stochastic=False).round(exact), exact.bfloat16())


def test_blocks_are_the_whole_tensors_rounding(barely_trained: Path) -> None:
    run = open_run(barely_trained)
    exact = dict(Rewriting(run, torch.float32).tensors())
    for name, tensor in Rewriting(run, torch.bfloat16, stochastic=True).tensors():
        assert torch.equal(tensor, rounded(exact[name], torch.bfloat16, name)), name


def files_and_random(parity: Parity | None) -> tuple[float, float]:
    assert parity is not None
    rows = {row.model: row.figures.median_kl_nats for row in parity.comparisons if row.dtype == "float32"}
    return rows[EXPORTED], rows[RANDOM]


@pytest.mark.parametrize("walk", [False, True])
def test_small_updates_are_kept_by_themselves(walk: bool, barely_trained: Path, tmp_path: Path) -> None:
    lost, random = files_and_random(export_run(barely_trained, tmp_path / "lost", rounding="nearest").parity)
    assert lost > LOSSY_PROPORTION**2 * random
    done = export_run(barely_trained, tmp_path / "kept", walk=walk)
    kept, random = files_and_random(done.parity)
    assert kept < random < lost / 2
    assert done.record["rounding"] == "stochastic"
    assert "| weights | | bfloat16, rounded by chance |" in (done.out / "README.md").read_text()
    assert json.loads((tmp_path / "kept/pat_export.json").read_text())["rounding"] == "stochastic"
    again = export_run(barely_trained, tmp_path / "again", rounding="stochastic", walk=walk)
    assert again.record["files"]["model.safetensors"] == done.record["files"]["model.safetensors"]
    verify_export(tmp_path / "kept", barely_trained, walk=walk).require()


def test_a_damaged_number_is_found(barely_trained: Path, tmp_path: Path) -> None:
    out = export_run(barely_trained, tmp_path / "out", rounding="stochastic").out
    (record := out / "pat_export.json").write_text(json.dumps(json.loads(record.read_text()) | {"files": {}}))
    tensors = load_file(out / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    weight[0, 0] = weight[0, 0] * 1.02
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParityError, match=r"q_proj\.weight to be the rewritten tensor"):
        verify_export(out, barely_trained)


def test_a_training_that_moves_far_has_the_nearest_values(base: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", base, counts={"layers": 3})
    done = export_run(run, tmp_path / "out")
    assert done.record["rounding"] == "nearest"
    exact = dict(Rewriting(open_run(run), torch.float32).tensors())
    for name, tensor in load_file(done.out / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": "up"}, "--rounding: expected auto, nearest, stochastic, found up"),
        ({"rounding": "stochastic", "dtype": "float32"}, "expected files of 16 bits, found float32"),
        ({"rounding": "stochastic", "quantize": "int8"}, "expected files of 16 bits, found --quantize int8"),
    ],
)
def test_what_cannot_be_rounded_so(
    settings: dict[str, str], message: str, barely_trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export_run(barely_trained, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
