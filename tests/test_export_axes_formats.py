"""Cuts of every axis in every format, by random counts, and judged again later."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import BrokenPlan
from pat_serve.export.exporter import export_run
from pat_serve.export.verify import verify_export
from pat_serve.families.architectures import FAMILIES
from pat_serve.training import run as training_run
from pat_serve.training.config import TrainRecipe
from tests.random_runs import PROMPT, random_run
from tests.test_export_axes import OWN, SHAPES, SIZES, make_run
from tests.tiny_models import save_tiny_family

KEPT = {"hidden": range(24, 65, 8), "layers": range(1, 5), "ffn": range(1, 129), "kv_groups": range(1, 5)}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_random_counts(seed: int, model_type: str, tmp_path: Path):
    draw = random.Random(f"{seed} {model_type}")
    base = save_tiny_family(tmp_path / "base", model_type, seed, **(SIZES | OWN[model_type]))
    checkpoint, counts = open_checkpoint(str(base)), {}
    while not counts or checkpoint.family.obstacles(checkpoint.sizes, checkpoint.sizes.with_counts(counts)):
        counts = {axis: draw.choice(kept) for axis, kept in KEPT.items() if draw.random() < 0.7}
    done = export_run(random_run(tmp_path / "run", base, counts=counts), tmp_path / "out", walk=draw.random() < 0.5)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 1e-4, counts
    tensors = load_file(done.out / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == done.record["parameters"]["exported"]
    model, report = AutoModelForCausalLM.from_pretrained(done.out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == counts.get("layers", 4)


def test_the_export_is_what_was_trained_on_the_smaller_model(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Closes the chain: the smaller model's last logits are those of the files, with the updates of every layer."""
    base = save_tiny_family(tmp_path / "base", "llama", **(SIZES | OWN["llama"]))
    trained: dict[str, torch.Tensor] = {}
    finish = training_run._finish

    def keep_logits(prepared: Any, run: Path, job: Any, ranks: Any) -> None:
        with torch.no_grad():
            trained["logits"] = job.trainer.model.eval()(input_ids=PROMPT, use_cache=False).logits
        finish(prepared, run, job, ranks)

    monkeypatch.setattr(training_run, "_finish", keep_logits)
    short = {"max_steps": 12, "batch_size": 2, "gradient_accumulation_steps": 1, "dtype": "float32"}
    recipe = TrainRecipe(model=str(base), data=str(rows), shape=SHAPES["all"], learning_rate=2e-3, **short)
    training_run.start(recipe, tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out", walk=True)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    with torch.no_grad():
        narrow = AutoModelForCausalLM.from_pretrained(done.out)(input_ids=PROMPT).logits
    assert (narrow - trained["logits"]).abs().max() / narrow.std() < 2e-5
    # A layer beyond the smaller model's number of layers was kept, and its updates count.
    assert done.record["cuts"]["layers"][-1] == 3


@pytest.mark.parametrize(("model_type", "dtype"), [("qwen3", "bfloat16"), ("phi3", "float16"), ("qwen2", "bfloat16")])
def test_16_bit_files(model_type: str, dtype: str, tmp_path: Path):
    done = export_run(make_run(tmp_path, model_type, SHAPES["all"]), tmp_path / "out", dtype=dtype)
    assert done.parity is not None
    exact, _, files, _, own = done.parity.comparisons
    assert exact.figures.max_abs_over_std < 2e-5
    assert files.passed
    assert own.passed


@pytest.mark.parametrize(("model_type", "scheme"), [("phi3", "int8"), ("llama", "fp8")])
def test_8_bit_files_are_made_and_judged_again(model_type: str, scheme: str, tmp_path: Path):
    run = make_run(tmp_path, model_type, SHAPES["all"])
    done = export_run(run, tmp_path / "out", dtype="bfloat16", quantize=scheme)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    found = verify_export(done.out, run)
    assert found.parity.passed
    assert found.quality is not None
    assert found.quality.passed


def test_gguf_is_the_same_model(tmp_path: Path):
    pytest.importorskip("gguf")
    out = export_run(make_run(tmp_path, "llama", SHAPES["all"]), tmp_path / "out", gguf=True).out
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim"):
        assert getattr(read.config, name) == getattr(ours.config, name), name
    with torch.no_grad():
        difference = (ours(input_ids=PROMPT).logits - read(input_ids=PROMPT).logits).abs().max()
    assert difference < 1e-5


def test_other_cuts_are_another_run(tmp_path: Path):
    """The count is the same; the first layer keeps other channels."""
    run = make_run(tmp_path, "llama", SHAPES["ffn"])
    out = export_run(run, tmp_path / "out", parity=False).out
    assert verify_export(out, run).parity.passed
    record = json.loads((out / "pat_export.json").read_text())
    kept = record["cuts"]["ffn.0"]
    record["cuts"]["ffn.0"] = sorted([*kept[1:], min(set(range(128)) - set(kept))])
    (out / "pat_export.json").write_text(json.dumps(record))
    with pytest.raises(BrokenPlan, match="found one with other cuts"):
        verify_export(out, run)


def test_a_record_of_version_1_has_the_width_alone(tmp_path: Path):
    run = make_run(tmp_path, "llama", SHAPES["hidden"])
    out = export_run(run, tmp_path / "out", parity=False).out
    record = json.loads((out / "pat_export.json").read_text())
    first = {name: value for name, value in record.items() if name not in ("cuts", "shape")}
    first |= {"version": 1, "kept_channels": record["cuts"]["hidden"]}
    (out / "pat_export.json").write_text(json.dumps(first))
    assert verify_export(out, run).parity.passed
    first["kept_channels"] = [*range(47), 63]
    (out / "pat_export.json").write_text(json.dumps(first))
    with pytest.raises(BrokenPlan, match="found one with other cuts"):
        verify_export(out, run)
