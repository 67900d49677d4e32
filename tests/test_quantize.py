"""8-bit exports: exact arithmetic, the config that loaders read, and a gate that can refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pat_serve.errors import BrokenCheckpoint, MissingExtra, ParityError, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.formats import quality, quantize
from pat_serve.export.formats.overflow import round_floats
from pat_serve.export.formats.quality import measure_quality
from pat_serve.export.formats.schemes import (
    FP8,
    INT8,
    SCHEMES,
    dequantize_channels,
    quantization_config,
    quantize_channels,
)
from pat_serve.export.formats.sizes import parse_size
from tests.test_export_parity import PROMPT, random_run
from tests.tiny_models import save_tiny_family, save_tiny_llama

EIGHT_BITS = (INT8, FP8)


@pytest.fixture(scope="module")
def exact(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(finished_run, tmp_path_factory.mktemp("exact") / "out", dtype="float32").out


@pytest.fixture(scope="module")
def int8(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(finished_run, tmp_path_factory.mktemp("int8") / "out", dtype="bfloat16", quantize="int8").out


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda scheme: scheme.name)
def test_every_weight_is_within_half_a_step(scheme):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 16)[:, None]
    stored, scale = quantize_channels(weight, scheme)
    assert stored.dtype == scheme.dtype
    assert (stored.shape, scale.shape, scale.dtype) == ((16, 64), (16, 1), torch.float32)
    assert (stored.float().abs().amax(1) == scheme.largest).all()  # each channel uses the whole range
    error = (dequantize_channels(stored, scale) - weight).abs()
    # int8's step is one scale; e4m3 has 3 bits of mantissa, and steps of 2**-9 below its smallest normal number.
    half = scale / 2 if scheme is INT8 else torch.maximum(weight.abs() / 16, scale * 2**-10)
    assert (error <= half * 1.0001).all()


@pytest.mark.vllm
@pytest.mark.parametrize("sign", [1, -1])
def test_vllms_cpu_kernel_never_saturates(sign: int):
    """The worst case: all weights of a channel and all activations of a token at their largest."""
    import_module("vllm")  # loads the kernels
    import vllm._custom_ops as ops

    stored, scale = quantize_channels(torch.full((32, 64), 0.7), INT8)
    kernel = ops.create_onednn_scaled_mm(stored.t(), scale, torch.float32, True, False, 32)
    rounded, token_scale, _ = ops.onednn_scaled_int8_quant(sign * torch.full((3, 64), 2.0), None, None, True)
    product = torch.empty(3, 32)
    ops.onednn_scaled_mm(kernel, rounded, product, token_scale, None, None, None)
    torch.testing.assert_close(product, torch.full((3, 32), sign * 0.7 * 2.0 * 64))


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda scheme: scheme.name)
def test_a_dead_channel_stays_zero(scheme):
    stored, scale = quantize_channels(torch.zeros(2, 8), scheme)
    assert torch.equal(dequantize_channels(stored, scale), torch.zeros(2, 8))
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_config_is_compressed_tensors_own_preset(scheme):
    """Checked against the package that transformers and vLLM read it with."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    read = QuantizationConfig.model_validate(quantization_config(scheme))
    assert read.ignore == ["lm_head"]
    presets = {"int8": "INT8", "fp8": "FP8_DYNAMIC", "int4": "W4A16"}
    preset = preset_name_to_scheme(presets[scheme.name], ["Linear"])
    [group] = read.config_groups.values()
    assert (group.input_activations is None) == (preset.input_activations is None)
    for part in ("weights", "input_activations") if preset.input_activations else ("weights",):
        for name in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size"):
            assert getattr(getattr(group, part), name) == getattr(getattr(preset, part), name), (part, name)


def test_weights_come_from_the_exact_float32_ones(exact: Path, int8: Path):
    before, after = load_file(exact / "model.safetensors"), load_file(int8 / "model.safetensors")
    for name, tensor in before.items():
        if f"{name}_scale" in after:
            stored, scale = quantize_channels(tensor, INT8)
            assert torch.equal(after[name], stored)
            assert torch.equal(after[f"{name}_scale"], scale)
        else:
            assert torch.equal(after[name], tensor.bfloat16())
    scales = {name for name in after if name.endswith("_scale")}
    assert len(scales) == 7 * 2  # every linear of both layers, neither head nor embedding
    assert after.keys() - scales == before.keys()


def test_transformers_runs_it(exact: Path, int8: Path):
    """Stock transformers, with compressed-tensors: weights and activations in 8 bits, close to the float model."""
    with torch.no_grad():
        float_logits = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)(input_ids=PROMPT).logits
        loaded, report = AutoModelForCausalLM.from_pretrained(int8, dtype=torch.float32, output_loading_info=True)
        logits = loaded(input_ids=PROMPT).logits
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    difference = (logits - float_logits).abs().max() / float_logits.std()
    assert 1e-4 < difference < 0.3  # rounded, and to 8 bits


def test_the_record_and_the_files(int8: Path):
    record = json.loads((int8 / "pat_export.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert record["parity"]["dtype"] == "float32"  # the exact weights were proven, then rounded
    assert record["parity"]["passed"]
    figures = record["quantization"]["quality"]
    assert figures["passed"]
    assert 0.9 < figures["perplexity_ratio"] <= 1.02
    assert 0 < figures["mean_kl_nats"] < 0.02
    assert figures["tokens"] > 100
    assert not [path.name for path in int8.iterdir() if path.name.startswith(".")]
    config = json.loads((int8 / "config.json").read_text())
    assert (config["dtype"], config["quantization_config"]["format"]) == ("bfloat16", "int-quantized")


@pytest.mark.slow
def test_fp8_is_read_and_judged_through_compressed_tensors(exact: Path, finished_run: Path, tmp_path: Path):
    done = export_run(finished_run, tmp_path / "fp8", dtype="bfloat16", quantize="fp8")
    assert done.quality is not None
    assert done.quality.mean_kl_nats > 0
    with safe_open(done.out / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_dtype() == "F8_E4M3"
    loaded = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32)
    with torch.no_grad():
        loaded(input_ids=PROMPT)  # dequantises
    weight = load_file(exact / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = dequantize_channels(*quantize_channels(weight, FP8))
    torch.testing.assert_close(loaded.model.layers[0].mlp.up_proj.weight, expected)


def test_shards(exact: Path, tmp_path: Path):
    quantize.quantize_folder(exact, tmp_path, INT8, torch.float16, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    whole = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", ["gemma", "phi3", "qwen2"])
def test_other_families(family: str, tmp_path: Path):
    """Scaled and tied embedding, fused projections, biases; in bfloat16 the embedding's factor is another one."""
    overrides = {"head_dim": 32} if family == "gemma" else {"pad_token_id": 2}
    base = save_tiny_family(tmp_path / "base", family, dtype=torch.bfloat16, **overrides)
    done = export_run(random_run(tmp_path / "run", base), tmp_path / "out", quantize="int8")
    assert done.quality is not None
    assert done.quality.passed
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 1e-4


def test_damage_is_refused_and_leaves_nothing(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def careless(weight, scheme):
        stored, scale = quantize_channels(weight, scheme)
        return stored, scale * 1.2

    monkeypatch.setattr(quantize, "quantize_channels", careless)
    with pytest.raises(ParityError, match="loses too much in 8 bits"):
        export_run(finished_run, tmp_path / "out", quantize="int8")
    assert list(tmp_path.iterdir()) == []


def test_activations_count(exact: Path, tmp_path: Path):
    """A loud input channel that no weight reads spoils the rounding of its neighbours, and nothing but that."""
    kl = {}
    for gain in (1.0, 300.0):
        folder = tmp_path / str(gain)
        shutil.copytree(exact, folder / "exact")
        tensors = load_file(folder / "exact/model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                tensor[:, 0] = 0
            elif name.endswith("layernorm.weight"):
                tensor[0] = gain
        save_file(tensors, folder / "exact/model.safetensors", {"format": "pt"})
        (folder / "int8").mkdir()
        quantize.quantize_folder(folder / "exact", folder / "int8", INT8, torch.float32, 2**40)
        kl[gain] = measure_quality(folder / "exact", folder / "int8", INT8, PROMPT.tolist()).mean_kl_nats
    assert kl[300.0] > 10 * kl[1.0]


def test_limits(exact: Path, int8: Path):
    measured = dataclasses.replace(measure_quality(exact, int8, INT8, PROMPT.tolist()), perplexity_before=40.0)
    assert measured.uniform_perplexity == 384
    assert measured.passed
    # Text that the float model itself finds less likely than noise: the KL alone judges.
    alien = dataclasses.replace(measured, perplexity_before=400.0, perplexity_ratio=1.06)
    assert alien.passed
    assert not dataclasses.replace(alien, mean_kl_nats=0.16).passed
    assert not dataclasses.replace(alien, perplexity_before=float("nan")).passed
    for bad in ({"perplexity_ratio": float("nan")}, {"perplexity_ratio": 1.06}, {"mean_kl_nats": 0.16}):
        assert not dataclasses.replace(measured, **bad).passed


def test_unknown_scheme(finished_run: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="int8, int4, fp8, found int3"):
        export_run(finished_run, tmp_path / "out", quantize="int3")


def test_without_compressed_tensors(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pat-serve\[quantize\]"):
        export_run(finished_run, tmp_path / "out", quantize="int8")
    done = export_run(finished_run, tmp_path / "out", quantize="int8", parity=False)
    assert done.record["quantization"] == {"scheme": "int8", "format": "int-quantized", "quality": None}


def test_float16_refuses_what_overflows(tmp_path: Path):
    assert round_floats(torch.tensor([65504.0]), torch.float16, "w").item() == 65504
    with pytest.raises(BrokenCheckpoint, match=r"w: expected values up to 65504.*found 70000.*bfloat16"):
        round_floats(torch.tensor([70000.0]), torch.float16, "w")
    base = save_tiny_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = random_run(tmp_path / "run", base)
    with pytest.raises(UsageError, match=r"model.embed_tokens.weight.*6.55e\+04.*bfloat16"):
        export_run(run, tmp_path / "out", dtype="float16")
    with pytest.raises(BrokenCheckpoint, match=r"model.embed_tokens.weight: expected values up to 65504"):
        export_run(run, tmp_path / "out", dtype="float16", quantize="int8", parity=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5gib", 3 * 2**29), ("2 GB", 2 * 10**9), ("3000000", 3_000_000)],
)
def test_shard_sizes(text: str, size_bytes: int):
    assert parse_size(text, "--max-shard-size") == size_bytes


@pytest.mark.parametrize("text", ["", "5", "GB", "-5GB", "5XB", "5 giga", "nan", "1KB", "0GB"])
def test_no_shard_sizes(text: str):
    with pytest.raises(UsageError, match="--max-shard-size: expected a size of 1MB or more"):
        parse_size(text, "--max-shard-size")
