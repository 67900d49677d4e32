"""Rounding to 16 bits is judged by what it does to the model at hand, at every depth; mistakes are still refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.errors import ParityError
from pat_serve.export.exporter import export_run
from pat_serve.export.parity.comparison import EXACT, EXPORTED, RANDOM, TRAINED, Parity
from pat_serve.export.parity.figures import TOLERANCES, TYPICAL_PROPORTION, Figures, proportional
from pat_serve.export.parity.gate import measure_parity
from pat_serve.export.parity.models import LoadedModels
from pat_serve.export.rewrite import job
from pat_serve.export.rewrite.fused import fuse
from pat_serve.export.rewrite.rounding import FileCheck, is_rounded, round_at_random
from pat_serve.export.run.reader import open_run
from tests.random_runs import random_run
from tests.tiny_models import save_tiny_family, save_tiny_llama

DTYPES = ("bfloat16", "float16")
NARROW = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def depths(*quick: int) -> pytest.MarkDecorator:
    """A run of each depth; only the quick ones are in the tests that everybody runs."""
    every = [pytest.param(layers, marks=() if layers in quick else pytest.mark.slow) for layers in (8, 32, 80)]
    return pytest.mark.parametrize("deep_run", every, indirect=True)


@pytest.fixture(scope="module")
def deep_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"deep{request.param}")
    base = save_tiny_llama(folder / "base", num_hidden_layers=request.param, rms_norm_eps=1e-3, **NARROW)
    # An adapter on all modules would take most of the time here, and is tested elsewhere.
    return random_run(folder / "run", base, scale_spread=0.01, lora={"target_modules": ["q_proj", "down_proj"]})


@depths(8, 32)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_export_passes_at_every_depth(dtype: str, deep_run: Path, tmp_path: Path):
    parity = export_run(deep_run, tmp_path / "out", dtype=dtype).parity
    assert parity is not None
    rows = {(row.model, row.dtype): row for row in parity.comparisons}
    assert rows[EXACT, "float32"].figures.within(TOLERANCES[torch.float32])
    for ours, yardstick in (((EXPORTED, "float32"), (RANDOM, "float32")), ((EXPORTED, dtype), (TRAINED, dtype))):
        assert rows[ours].yardstick == f"{yardstick[0]} in {yardstick[1]}"
        # The yardstick is of the rounding's own size: it can tell what is out of proportion.
        ratio = rows[ours].figures.median_kl_nats / rows[yardstick].figures.median_kl_nats
        assert 1 / TYPICAL_PROPORTION < ratio < TYPICAL_PROPORTION


def drop(**parts: None) -> Callable[..., object]:
    return lambda spec, *others: replace(fuse(spec, *others), **parts)


def make(mistake: str, patch: pytest.MonkeyPatch) -> None:
    if mistake == "eps":
        patch.setattr("pat_serve.export.rewrite.config.exported_eps", lambda eps, cut: eps)
    elif mistake == "scale":
        patch.setattr(job, "fuse", drop(scale_K=None))
    else:
        patch.setattr(job, "fuse", drop(l0_RD=None, l1_KR=None))


@depths(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["eps", "scale", "operator"])
def test_the_published_mistakes_are_refused_at_every_depth(
    mistake: str, dtype: str, deep_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(mistake, monkeypatch)
    with pytest.raises(ParityError, match=r"exported, not rounded, transformers in float64.*Nothing was exported"):
        export_run(deep_run, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_gains_taken_for_llamas_are_refused(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = random_run(tmp_path / "run", save_tiny_family(tmp_path / "base", "gemma", num_hidden_layers=8))
    rewrite = job.rewrite_tensor
    monkeypatch.setattr(
        job, "rewrite_tensor", lambda *parts, **settings: rewrite(*parts, **settings | {"norm_offset": 0.0})
    )
    with pytest.raises(ParityError, match=r"exported, not rounded, transformers in float64"):
        export_run(run, tmp_path / "out", dtype=dtype)


def scaled(tensors: dict[str, Tensor]) -> str:
    tensors["model.norm.weight"] *= 1.01
    return "model.norm.weight"


def swapped(tensors: dict[str, Tensor]) -> str:
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return first


def zeroed(tensors: dict[str, Tensor]) -> str:
    """Zero the embedding of a token that stands in no prompt: no logit shows it."""
    tensors["model.embed_tokens.weight"][383] = 0
    return "model.embed_tokens.weight"


def damaged(out: Path, damage: Callable[[dict[str, Tensor]], str]) -> str:
    tensors = load_file(out / "model.safetensors")
    name = damage(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return name


@depths(8)
@pytest.mark.parametrize("damage", [scaled, swapped, zeroed])
@pytest.mark.parametrize("dtype", ["float32", *DTYPES])
def test_damage_to_a_file_is_named_at_every_depth(
    dtype: str, damage: Callable[[dict[str, Tensor]], str], deep_run: Path, tmp_path: Path
):
    out = export_run(deep_run, tmp_path / "out", dtype=dtype, parity=False).out
    name, run, target = damaged(out, damage), open_run(deep_run), getattr(torch, dtype)
    for same_machine in (True, False):
        check = FileCheck(folder=out, dtype=target, out=out, same_machine=same_machine)
        with pytest.raises(ParityError, match=rf"{name} to be the .*rounded to {dtype}.*in model\.safetensors"):
            LoadedModels(run=run, check=check, model_dtype=target).check_files()


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", *DTYPES])
def test_the_gate_checks_the_files(dtype: str, walk: bool, tmp_path: Path):
    run = random_run(tmp_path / "run", save_tiny_llama(tmp_path / "base", **NARROW))
    out = export_run(run, tmp_path / "out", dtype=dtype, parity=False).out
    name = damaged(out, zeroed)
    with pytest.raises(ParityError, match=f"{name} to be the"):
        measure_parity(open_run(run), out, getattr(torch, dtype), walk=walk)


def scaled_stream(folder: Path, factor: float) -> Path:
    """A run whose residual stream is so many times what it was, in every way the same function."""
    base = save_tiny_llama(folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": config["rms_norm_eps"] * factor**2}))
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(writer in name for writer in ("embed_tokens", "o_proj", "down_proj")):
                parameter *= factor
    model.save_pretrained(base)
    return random_run(folder / "run", base, lora={"target_modules": ["q_proj", "up_proj"]})


def test_numbers_too_small_for_float16_are_out_of_proportion(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = scaled_stream(tmp_path, 2e-6)
    with pytest.raises(ParityError, match=r"in proportion to exported, rounded.*--dtype bfloat16 or float32"):
        export_run(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert "FAIL" in capsys.readouterr().err
    assert export_run(run, tmp_path / "out", dtype="bfloat16").parity


def test_activations_too_large_for_float16(tmp_path: Path):
    run = scaled_stream(tmp_path, 1e5)
    with pytest.raises(ParityError, match=r"found numbers that are not finite.*--dtype bfloat16 or float32"):
        export_run(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_rounding_that_costs_a_lot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sixteen layers that amplify what they get: bfloat16 leaves little of the model, as any rounding of it would."""
    base = save_tiny_llama(tmp_path / "base", num_hidden_layers=16)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4
    model.save_pretrained(base)
    parity = export_run(random_run(tmp_path / "run", base), tmp_path / "out", dtype="bfloat16").parity
    assert isinstance(parity, Parity)
    assert parity.headline.mean_kl_nats > 0.02
    assert any("--dtype float32" in note for note in parity.notes)


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_random_rounding_is_within_half_a_step(dtype: torch.dtype, compute: torch.dtype):
    exact = torch.randn(700, 900, generator=torch.Generator().manual_seed(0), dtype=compute) * 3
    exact[0] = 0
    moved = exact.clone()
    round_at_random(moved, "a tensor", dtype)
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1) * torch.finfo(dtype).eps
    shares = ((moved - exact) / step)[1:]
    assert torch.equal(moved[0], exact[0])
    assert shares.abs().max() <= 0.5 + 1e-3
    assert shares.mean().abs() < 0.01
    # Uniform within the step, as the errors of a rounding are.
    assert shares.std() == pytest.approx(1 / math.sqrt(12), rel=0.01)
    rounded = (exact.to(dtype).to(compute) - exact)[1:] / step[1:]
    assert rounded.std() == pytest.approx(float(shares.std()), rel=0.02)
    again, other = exact.clone(), exact.clone()
    round_at_random(again, "a tensor", dtype)
    round_at_random(other, "another one", dtype)
    assert torch.equal(again, moved)
    assert not torch.equal(other, moved)


def test_what_a_yardstick_allows():
    yardstick = Figures(
        positions=9,
        max_abs=1,
        logits_std=2,
        max_abs_over_std=0.5,
        mean_kl_nats=1e-3,
        median_kl_nats=1e-4,
        top1_agreement=0.9,
    )
    tolerance = proportional(yardstick)
    right = replace(yardstick, max_abs_over_std=9.0, mean_kl_nats=0.09, median_kl_nats=8e-4, top1_agreement=0.1)
    assert right.within(tolerance)
    assert not replace(right, mean_kl_nats=0.11).within(tolerance)
    assert not replace(right, median_kl_nats=1e-3).within(tolerance)
    for broken in (math.nan, math.inf):
        assert not replace(right, max_abs_over_std=broken).within(tolerance)
        assert not replace(right, mean_kl_nats=broken).within(tolerance)
        assert not right.within(proportional(replace(yardstick, max_abs_over_std=broken)))
    # No yardstick is finer than the order of additions.
    still = replace(yardstick, max_abs_over_std=0.0, mean_kl_nats=0.0, median_kl_nats=0.0)
    assert replace(right, mean_kl_nats=1e-9, median_kl_nats=1e-9).within(proportional(still))


def test_the_nearest_value_of_a_number_below_float16s_normal_ones():
    exact = torch.linspace(-3e-7, 3e-7, 1001)
    assert is_rounded(exact, exact.half())
    assert not is_rounded(exact, exact.half() + torch.tensor(6e-8).half())
