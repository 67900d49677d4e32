"""4-bit exports: what is written, what it was calibrated on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.locate import read_config
from pat_serve.cli.calibration import calibration_of
from pat_serve.errors import DataError, ParityError, UnsupportedModel, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.files.model_files import write_model
from pat_serve.export.formats import calibrated
from pat_serve.export.formats.calibrated import CALIBRATION_TOKENS, PROMPT_TOKENS, Calibration, bounded, round_layers
from pat_serve.export.formats.check import check_quantized
from pat_serve.export.formats.gptq import dequantize_groups, round_groups, unpack_codes
from pat_serve.export.formats.schemes import INT4
from pat_serve.export.run.reader import open_run
from pat_serve.export.verify import verify_export
from pat_serve.machine import hardware
from pat_serve.shapes.cpu_kernels import check_cpu_kernels
from tests.random_runs import PROMPT, random_run
from tests.tiny_models import save_tiny_family, save_tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    return random_run(folder / "run", save_tiny_llama(folder / "base", hidden_size=96), width=64)


@pytest.fixture(scope="module")
def exact(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    write_model(open_run(run, None), folder, torch.float32, 2**40)
    return folder


@pytest.fixture(scope="module")
def int4(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("out") / "int4", dtype="bfloat16", quantize="int4").out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The four-bit weights of an export, as a loader sees them."""
    tensors = load_file(folder / "model.safetensors")
    names = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]
    return {
        name: dequantize_groups(unpack_codes(tensors[f"{name}_packed"]), tensors[f"{name}_scale"]) for name in names
    }


def test_the_files_and_the_record(int4: Path, exact: Path):
    tensors, floats = load_file(int4 / "model.safetensors"), load_file(exact / "model.safetensors")
    names = weights_of(int4)
    assert len(names) == 7 * 2  # every linear of both layers, neither head nor embedding
    for name in names:
        rows, inputs = floats[name].shape
        assert tensors[f"{name}_shape"].tolist() == [rows, inputs]
        # 64 is the largest group that divides the inputs 64 (width) and 128 (heads, FFN).
        assert tensors[f"{name}_scale"].shape == (rows, inputs // 64)
        assert tensors[f"{name}_scale"].dtype == torch.bfloat16
    for name in floats.keys() - names.keys():
        assert torch.equal(tensors[name], floats[name].bfloat16())
    record = json.loads((int4 / "pat_export.json").read_text())
    quantization = record["quantization"]
    assert quantization["group_size"] == 64
    assert quantization["calibration"]["source"] == "the run's own prompts"
    assert quantization["calibration"]["tokens"] == 40
    assert quantization["quality"]["passed"]
    assert 1e-4 < quantization["quality"]["mean_kl_nats"] < 0.26
    assert record["parity"]["passed"]  # of the exact weights, before they were rounded
    config = json.loads((int4 / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    card = (int4 / "README.md").read_text()
    assert "int4 (W4A16, compressed-tensors)" in card
    assert "in groups of 64 by GPTQ" in card


def test_transformers_reads_the_weights_that_were_written(int4: Path):
    loaded, report = AutoModelForCausalLM.from_pretrained(int4, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        loaded(input_ids=PROMPT)  # dequantises
    for name, weight in weights_of(int4).items():
        torch.testing.assert_close(loaded.get_parameter(name), weight)


def test_calibration_serves_its_own_text(run: Path, exact: Path):
    """The model rounded for some prompts is nearer to the float one on them than the model rounded to the nearest."""
    prompts = PROMPT.tolist()
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, weight in weights.items():
            model.get_parameter(name).data = weight
        with torch.no_grad():
            return model(input_ids=PROMPT).logits

    wanted = logits({})
    rounded = round_layers(exact, prompts, 64, torch.float32)
    floats = load_file(exact / "model.safetensors")
    nearest = {name: dequantize_groups(round_groups(floats[name], of.scale), of.scale) for name, of in rounded.items()}
    moved = {name: dequantize_groups(unpack_codes(of.packed), of.scale) for name, of in rounded.items()}
    lost = [float((logits(weights) - wanted).square().mean()) for weights in (nearest, moved)]
    assert lost[1] < 0.7 * lost[0]


def test_padding_is_no_text(exact: Path):
    """A short prompt beside a long one counts as if it stood alone."""
    first, second = PROMPT[0].tolist(), PROMPT[1, :7].tolist()
    seen = {}
    kept = calibrated._moments

    def moments(*arguments: Any) -> dict[str, torch.Tensor]:
        found = kept(*arguments)
        seen.setdefault("first layer", found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "_moments", moments)
        both = {}
        for prompts in ([first], [second], [first, second]):
            round_layers(exact, prompts, 64, torch.float32)
            both[len(prompts), len(prompts[0])] = seen.pop("first layer")
    sizes = {(1, 40): 40 / 47, (1, 7): 7 / 47}
    for path, together in both[2, 40].items():
        torch.testing.assert_close(together, sum(share * both[key][path] for key, share in sizes.items()))


@pytest.mark.parametrize("family", ["gemma", "phi3", "qwen2"])
def test_other_families(family: str, tmp_path: Path):
    """Scaled and tied embedding, fused projections, biases."""
    overrides = {"head_dim": 32} if family == "gemma" else {"pad_token_id": 2}
    base = save_tiny_family(tmp_path / "base", family, dtype=torch.bfloat16, **overrides)
    run = random_run(tmp_path / "run", base, width=32)
    done = export_run(run, tmp_path / "out", quantize="int4")
    assert done.quality is not None
    assert done.quality.passed
    check_quantized(open_run(run, None), done.out, INT4.in_groups(32), torch.bfloat16)


def test_another_models_weights_are_found(int4: Path, run: Path, tmp_path: Path):
    from safetensors.torch import save_file

    (tmp_path / "copy").mkdir()
    tensors = load_file(int4 / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    opened, scheme = open_run(run, None), INT4.in_groups(64)
    for change in ({f"{name}_packed": tensors[f"{name}_packed"].roll(1, 0)}, {f"{name}_shape": torch.tensor([64, 96])}):
        save_file(tensors | change, tmp_path / "copy/model.safetensors", {"format": "pt"})
        with pytest.raises(ParityError, match=f"{name} to be the float32 tensor in the format"):
            check_quantized(opened, tmp_path / "copy", scheme, torch.bfloat16)


def test_it_is_judged_again(int4: Path, run: Path):
    found = verify_export(int4, run)
    assert found.quality is not None
    then = json.loads((int4 / "pat_export.json").read_text())["quantization"]["quality"]
    assert found.quality.as_dict()["mean_kl_nats"] == pytest.approx(then["mean_kl_nats"], rel=1e-3)
    assert found.as_dict()["passed"]


def test_a_width_that_no_group_divides(finished_run: Path, tmp_path: Path):
    """The shared run's width is 48."""
    with pytest.raises(
        UsageError, match=r"--quantize int4: expected linears whose inputs are all multiples of 32, found 48"
    ):
        export_run(finished_run, tmp_path / "out", quantize="int4")
    assert list(tmp_path.iterdir()) == []


def test_groups_fit_each_device(run: Path, tmp_path: Path):
    """Two devices have 64 inputs each of attention's output and of the MLP's; four have 32."""
    out = export_run(run, tmp_path / "out", quantize="int4", tp=(2,), parity=False).out
    assert json.loads((out / "pat_export.json").read_text())["quantization"]["group_size"] == 64


def test_the_data_of_a_calibration(run: Path, finished_run: Path, rows: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("Join list and dict. " * 2000)
    base = open_run(finished_run, None).base.folder
    found = {given: calibration_of(given and str(given), finished_run).prompts(base) for given in (None, rows, text)}
    assert found[None] == found[rows]  # the run was trained on these rows
    assert len(found[rows]) == 64
    assert all(len(prompt) <= PROMPT_TOKENS for prompts in found.values() for prompt in prompts)
    assert len(found[text]) > 2
    done = export_run(run, tmp_path / "out", quantize="int4", calibration=calibration_of(str(text), run), parity=False)
    assert done.record["quantization"]["calibration"]["source"] == "text.txt"
    assert done.record["quantization"]["calibration"]["tokens"] > 2 * PROMPT_TOKENS
    with pytest.raises(DataError, match="--calibration"):
        calibration_of(str(tmp_path / "lost.jsonl"), run).prompts(base)
    with pytest.raises(DataError, match="expected text to calibrate on, found none"):
        export_run(
            run, tmp_path / "new", quantize="int4", calibration=Calibration(source="x", prompts=lambda base: [[]])
        )
    assert not (tmp_path / "new").exists()


def test_float32_is_refused_before_an_engine_dies_of_it(int4: Path, exact: Path):
    """vLLM's CPU kernel: "cpu_gemm_wna16" not implemented for 'Float'."""
    with pytest.raises(UsageError, match=r"--dtype float32: expected bfloat16 or float16, since .* has 4-bit weights"):
        check_cpu_kernels(read_config(int4), "int4", "float32")
    check_cpu_kernels(read_config(int4), "int4", "bfloat16")
    check_cpu_kernels(read_config(exact), "exact", "float32")


def test_heads_without_a_kernel_are_refused_before_an_engine_dies_of_them():
    """vLLM's engine starts, and its first token ends in "Unsupported CPU attention configuration"."""
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": None}
    with pytest.raises(UnsupportedModel, match=r"thin: expected a head_dim that vLLM's CPU attention .*, found 16"):
        check_cpu_kernels(config, "thin", "bfloat16")
    check_cpu_kernels(config | {"head_dim": 64}, "wide", "bfloat16")
    check_cpu_kernels(config | {"kv_lora_rank": 8}, "compressed", "bfloat16")
    # transformers gives a Gemma heads of 256 where its config names none.
    check_cpu_kernels(config | {"model_type": "gemma"}, "gemma", "bfloat16")
    check_cpu_kernels({"n_head": 4}, "of another family", "bfloat16")


@pytest.mark.parametrize(
    ("vendor", "flags", "installed", "told"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f", "none", True),
        ("AuthenticAMD", "fpu avx2 avx512f", "2.13.0.2", False),
        ("AuthenticAMD", "fpu avx2", "none", False),
        ("GenuineIntel", "fpu avx2 avx512f", "none", False),
    ],
)
def test_missing_kernels_are_told(
    vendor: str, flags: str, installed: str, told: bool, int4: Path, exact: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "_version", lambda *_: installed)
    check_cpu_kernels(read_config(int4), "int4", "bfloat16")
    check_cpu_kernels(read_config(exact), "exact", "bfloat16")
    line = "int4: 4-bit weights are slow on this CPU without zentorch"
    assert (line in capsys.readouterr().err) == told
    check_cpu_kernels(read_config(exact), "exact", "bfloat16")
    assert capsys.readouterr().err == ""


def test_a_calibration_of_short_prompts_is_not_padded():
    windows = bounded([[1] * 100, [], [2] * 500, [3]])
    assert windows == [[1] * 100 + [2] * 412, [2] * 88 + [3]]
    assert bounded([]) == []


def test_a_calibration_is_bounded():
    prompts = bounded([[7] * 700] * 100)
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert sum(map(len, prompts)) == CALIBRATION_TOKENS
    assert bounded([[], [1, 2]]) == [[1, 2]]
