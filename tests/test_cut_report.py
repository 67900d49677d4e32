"""pat-train's report of a cut before it starts holds for the exported model."""

from __future__ import annotations

import json
import re
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.export.exporter import export_run
from pat_serve.shapes.candidates import counts_for_ratio, share_cut
from pat_serve.training.checks.cut_report import cut_lines
from pat_serve.training.checks.width import target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.test_recipe_defaults import DEFAULTS
from tests.test_resume import CrashError
from tests.tiny_models import save_tiny_family, save_tiny_llama


def lines(folder: Path, **settings) -> list[str]:
    checkpoint = open_checkpoint(str(folder))
    recipe = TrainRecipe(model="m", data="d", **settings).resolved(tied=checkpoint.tied)
    return cut_lines(recipe, checkpoint, target_shape(recipe, checkpoint))


def count(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # cannot be iterated


def smollm2(folder: Path) -> Path:
    """The shape of SmolLM2-135M, with none of its values: the headers alone are read."""
    config = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    AutoConfig.for_model("llama", **config).save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    for layer in range(30):
        for name, shape in {
            "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
            "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
            "mlp.down_proj": (576, 1536), "input_layernorm": (576,), "post_attention_layernorm": (576,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def test_a_quarter_of_smollm2_is_a_quarter_while_its_head_stays_tied(tmp_path: Path):
    [cut] = lines(smollm2(tmp_path), ratio=0.25)
    assert cut.startswith("cut: hidden_size 576 to 432; parameters 134.52 M to 100.89 M, 25.0% less; ")
    assert "24.7% less at 1x128, 14.7% less at 8x1024 (batch x context); KV cache unchanged" in cut


def test_a_quarter_of_smollm2_untied_is_a_quarter_of_its_parameters_too(tmp_path: Path):
    cut, head = lines(smollm2(tmp_path), ratio=0.25, tied_embeddings="untie")
    assert cut.startswith("cut: hidden_size 576 to 360; parameters 134.52 M to 101.77 M, 24.3% less; ")
    assert head.endswith("gets a matrix of its own: 17.69 M of these")


def test_no_word_of_a_head_where_it_was_one_before(tiny_base: Path, tmp_path: Path):
    assert len(lines(tiny_base, ratio=0.25)) == 1
    qwen = save_tiny_family(tmp_path, "qwen2", tie_word_embeddings=True)
    assert len(lines(qwen, ratio=0.25, tied_embeddings="keep")) == 1


@pytest.mark.parametrize("tie", ["keep", "untie"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.45])
def test_a_share_is_met_within_a_percent_whatever_becomes_of_the_tie(ratio: float, tie: str, tmp_path: Path):
    cut = lines(smollm2(tmp_path), ratio=ratio, tied_embeddings=tie)[0]
    [told] = re.findall(r"([\d.]+)% less; bytes", cut)
    assert float(told) / 100 == pytest.approx(ratio, abs=0.0105)


@pytest.mark.parametrize("axes", [("layers", "ffn"), ("hidden", "layers", "ffn"), ("layers", "ffn", "kv_groups")])
def test_a_share_along_several_axes_takes_the_mix_of_the_table(axes: tuple[str, ...], tmp_path: Path):
    checkpoint = open_checkpoint(str(smollm2(tmp_path)))
    recipe = TrainRecipe.build({"model": "m", "data": "d", "ratio": 0.25, "axes": ",".join(axes)}, "flags")
    assert recipe.method == ("pat" if "hidden" in axes else "cut")
    recipe = recipe.resolved(tied=True, narrows="hidden" in axes)
    found = target_shape(recipe, checkpoint)
    assert {"hidden": 576} | (counts_for_ratio(checkpoint.sizes, checkpoint.family, 0.25, axes) or {}) == found
    assert share_cut(checkpoint.sizes, checkpoint.sizes.with_counts(found)) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("tie", ["auto", "untie"])
def test_the_export_has_what_was_said(tie: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    start(tiny_recipe(base, rows, **DEFAULTS, tied_embeddings=tie, max_steps=1), tmp_path / "run")
    told = capsys.readouterr().err
    out = export_run(tmp_path / "run", tmp_path / "out").out
    [before, after] = re.findall(r"([\d.]+) M", told.partition("parameters ")[2].partition(";")[0])
    assert float(before) == pytest.approx(count(base) / 1e6, abs=0.005)
    assert float(after) == pytest.approx(count(out) / 1e6, abs=0.005)
    assert ("gets a matrix of its own" in told) == (tie == "untie")


@pytest.mark.parametrize("where", ["transformers.Trainer.training_step", "pat_serve.training.run._finish"])
def test_a_run_of_one_step_is_resumed(where: str, tiny_base: Path, rows: Path, tmp_path: Path):
    """The run stops before its step, and after it."""
    recipe = tiny_recipe(tiny_base, rows, **DEFAULTS, max_steps=1)
    start(recipe, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(CrashError):
            start(recipe, tmp_path / "run")
    assert resume(tmp_path / "run").steps == 1
    name = "adapter/adapter_model.safetensors"
    ours, whole = load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def crash(*_: object, **__: object) -> None:
    raise CrashError
