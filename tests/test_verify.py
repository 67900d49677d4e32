"""pat-export verify: an export is judged again, and whatever was changed since is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pat_serve.errors import BrokenCheckpoint, BrokenPlan, MissingModel, ParityError, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.run.hashes import hash_files
from pat_serve.export.verify import verify_export
from tests.random_runs import random_run
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return random_run(folder / "run", save_tiny_llama(folder / "base"))


@pytest.fixture(scope="module")
def pruned(run: Path) -> Path:
    return export_run(run, run.parent / "pruned", dtype="bfloat16").out


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_untouched_export(run: Path, pruned: Path):
    before = hash_files(pruned)
    record = json.loads((pruned / "pat_export.json").read_text())
    assert record["files"] == before
    assert set(before) == {"config.json", "model.safetensors"}
    found = verify_export(pruned, run)
    assert found.files == sorted(before)
    assert found.parity.passed
    # The same models on the same prompts: the export's own figures.
    for then, now in zip(record["parity"]["comparisons"], found.as_dict()["parity"]["comparisons"], strict=True):
        assert then["figures"] == pytest.approx(now["figures"], rel=1e-3, abs=1e-12)
    assert hash_files(pruned) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file(name: str, run: Path, copy: Path):
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=rf"{name}.*the file that was exported"):
        verify_export(copy, run)


def test_a_lost_and_an_added_weight_file(run: Path, copy: Path):
    (copy / "extra.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    with pytest.raises(BrokenCheckpoint, match=r"extra\.safetensors: expected no such file"):
        verify_export(copy, run)
    (copy / "extra.safetensors").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors.*found no such file"):
        verify_export(copy, run)


@pytest.mark.parametrize("change", ["one weight", "a whole tensor by a rounding"])
def test_a_change_that_hides_behind_new_hashes(change: str, run: Path, copy: Path):
    """Someone edits a tensor and the record with it: the run still knows better."""
    tensors = load_file(copy / "model.safetensors")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    if change == "one weight":
        weight[3, 5] += 0.01
    else:
        weight *= 1.004
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit(copy / "pat_export.json", files=hash_files(copy))
    with pytest.raises(ParityError, match=r"down_proj\.weight to be the rewritten tensor, rounded to bfloat16"):
        verify_export(copy, run)


def test_a_changed_eps_in_float32(run: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "out", dtype="float32").out
    config = json.loads((out / "config.json").read_text())
    edit(out / "config.json", rms_norm_eps=config["rms_norm_eps"] * 100)
    edit(out / "pat_export.json", files=hash_files(out))
    found = verify_export(out, run)
    assert not found.parity.passed
    with pytest.raises(ParityError, match="Export again"):
        found.require()


def test_another_run(run: Path, pruned: Path, tmp_path: Path):
    other = random_run(tmp_path / "run", run.parent / "base", width=40)
    with pytest.raises(BrokenPlan, match="other cuts"):
        verify_export(pruned, other)
    other = random_run(tmp_path / "other", save_tiny_llama(tmp_path / "base", seed=1))
    with pytest.raises(BrokenPlan, match="another base"):
        verify_export(pruned, other)


def test_what_is_no_export(run: Path, copy: Path, tmp_path: Path):
    with pytest.raises(MissingModel, match="no such folder"):
        verify_export(tmp_path / "nothing", run)
    with pytest.raises(MissingModel, match="without one"):
        verify_export(run, run)
    edit(copy / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    edit(copy / "pat_export.json", files=hash_files(copy))
    with pytest.raises(BrokenCheckpoint, match=r"config\.json: expected none, as pat_export\.json says"):
        verify_export(copy, run)
    (copy / "pat_export.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match="the record of an export"):
        verify_export(copy, run)


@pytest.fixture(scope="module")
def int8(run: Path) -> Path:
    return export_run(run, run.parent / "int8", dtype="bfloat16", quantize="int8").out


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_an_untouched_quantized_export(quantize: str, run: Path, int8: Path, tmp_path: Path):
    out = int8
    if quantize != "int8":
        out = export_run(run, tmp_path / "out", quantize=quantize, max_shard_bytes=100_000).out
    record = json.loads((out / "pat_export.json").read_text())
    found = verify_export(out, run)
    assert found.quality is not None
    then, now = record["quantization"]["quality"], found.quality.as_dict()
    assert then.pop("scheme") == now.pop("scheme") == quantize
    assert now == pytest.approx(then, rel=1e-3, abs=1e-9)
    assert found.parity.max_abs_over_std == pytest.approx(record["parity"]["max_abs_over_std"], rel=1e-3)
    assert found.as_dict()["passed"]
    assert found.files == sorted(hash_files(out))


@pytest.mark.parametrize("change", ["a step", "a scale", "a float", "lost", "added", "dtype"])
def test_a_quantized_weight_that_was_changed(change: str, run: Path, int8: Path, tmp_path: Path):
    copy = shutil.copytree(int8, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    if change == "a step":
        tensors[name][3, 5] += 2 if tensors[name][3, 5] < 0 else -2
    elif change == "a scale":
        tensors[f"{name}_scale"][3] *= 1.01
    elif change == "a float":
        name = "model.norm.weight"
        tensors[name][3] *= 1.02
    elif change == "lost":
        name = f"{name}_scale"
        del tensors[name]
    elif change == "added":
        name = f"{name}_zero_point"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit(copy / "pat_export.json", files=hash_files(copy))
    with pytest.raises(ParityError, match=f"{name} to be the float32 tensor in the format"):
        verify_export(copy, run)


def test_a_quantized_export_in_vllm_or_with_another_scheme(run: Path, int8: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--vllm"):
        verify_export(int8, run, scorer=lambda request: pytest.fail("asked"))
    copy = shutil.copytree(int8, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    edit(copy / "config.json", **config)
    edit(copy / "pat_export.json", files=hash_files(copy))
    with pytest.raises(BrokenCheckpoint, match="expected the quantization_config of int8"):
        verify_export(copy, run)


def test_quality_is_required_of_a_quantized_export(run: Path, int8: Path):
    found = verify_export(int8, run)
    assert found.quality is not None
    worse = replace(found, quality=replace(found.quality, mean_kl_nats=1.0))
    assert not worse.as_dict()["passed"]
    with pytest.raises(ParityError, match="Export again"):
        worse.require()
    found.require()


def test_the_command(run: Path, copy: Path):
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        script = "import sys; from pat_serve.cli.export import main; sys.argv[0] = 'pat-export'; main()"
        call = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    done = command("verify", copy, "--ckpt", run, "--json", "--walk")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["parity"]["layerwise"]
    assert "exported, transformers bfloat16" in done.stderr
    assert "2 files are those of the export" in done.stderr

    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1])
    done = command("verify", copy, "--ckpt", run)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("pat-export verify: ")
    assert "Traceback" not in done.stderr
    assert command("verify", copy).returncode == 2


def test_half_a_step_is_what_rounding_may_move():
    from pat_serve.export.rewrite.rounding import is_rounded

    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = exact.to(dtype)
        assert is_rounded(exact, rounded)
        assert is_rounded(exact * (1 + 1e-7), rounded)
        assert not is_rounded(exact, torch.nextafter(rounded, torch.tensor(9.0, dtype=dtype)))
        assert not is_rounded(exact, rounded[:-1])
