"""GGUF files that are not read as a base, or only in part."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pat_serve.checkpoints.locate import locate
from pat_serve.errors import BrokenCheckpoint, MissingExtra, ModelError, UnsupportedModel, UsageError
from pat_serve.gguf.folder import _Parts
from pat_serve.gguf.header import read_header
from tests.gguf_files import add, write_gguf
from tests.tiny_models import save_tiny_llama

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "a llama model without expert_count, found expert_count 8"),
        (lambda writer: writer.add_sliding_window(64), "without a sliding window, found one of 64 tokens"),
        (lambda writer: writer.add_logit_scale(0.5), "without logit_scale, found logit_scale 0.5"),
        (lambda writer: writer.add_rope_dimension_count_swa(16), None),
        (lambda writer: writer.add_causal_attention(True), None),
        (
            lambda writer: writer.add_causal_attention(False),
            "a model whose tokens see the ones before them alone, found attention.causal False",
        ),
        (
            lambda writer: (writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), writer.add_rope_scaling_factor(4)),
            "an unscaled or a linearly scaled rope, or Llama 3's, found yarn by 4.0",
        ),
        (
            lambda writer: add(writer, "rope_factors_long.weight", np.ones(16), "F32"),
            "without factors for long contexts, found the tensor rope_factors_long.weight",
        ),
        (lambda writer: add(writer, "blk.0.attn_sinks.weight", np.ones(4), "F32"), r"found blk\.0\.attn_sinks\.weight"),
    ],
    ids=["experts", "window", "logit scale", "harmless", "causal", "both ways", "yarn", "long rope", "tensor"],
)
def test_what_would_be_another_model_is_refused(change: Any, message: str | None, tmp_path: Path):
    file = write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32", change=change)
    if message is None:
        locate(str(file))
        return
    with pytest.raises(UnsupportedModel, match=message):
        locate(str(file))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.token_type", 1, "a type for each of 384 tokens, found 1"),
        ("tokenizer.ggml.token_type", [1, 2], "a type for each of 384 tokens, found 2 types"),
        ("tokenizer.ggml.merges", ["zz qq"], "a whole tokenizer in its metadata, found .*out of vocabulary"),
        ("llama.rope.freq_base", 0.0, r"llama\.rope\.freq_base as a positive number, found 0"),
        ("llama.rope.freq_base", float("nan"), r"llama\.rope\.freq_base as a positive number, found nan"),
        ("llama.attention.layer_norm_rms_epsilon", "1e-5", "layer_norm_rms_epsilon as a number, found '1e-5'"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(key: str, value: object, message: str, tmp_path: Path):
    header = read_header(write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32"))
    with pytest.raises(BrokenCheckpoint, match=message):
        _Parts(replace(header, metadata=header.metadata | {key: value}))


def test_an_id_that_is_no_tokens_is_passed_over(tmp_path: Path):
    header = read_header(write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32"))
    for name, found in (("bos", -1), ("eos", -(2**63)), ("padding", 384)):
        header = replace(header, metadata=header.metadata | {f"tokenizer.ggml.{name}_token_id": found})
    parts = _Parts(header)
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & set(parts.config | parts.generation_config)
    assert (parts.tokenizer.bos_token, parts.tokenizer.eos_token, parts.tokenizer.pad_token) == (None, None, None)


def test_a_damaged_header_is_refused_in_one_line(tmp_path: Path):
    file = write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32")
    whole, draw, told = file.read_bytes(), random.Random(0), []
    # From the magic to the tokens, and from there to the tensor table.
    data = min(tensor.offset_bytes for tensor in read_header(file).tensors.values())
    edges = [whole.index(b"tokenizer.ggml.tokens"), whole.index(b"tokenizer.ggml.bos_token_id"), data]
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[draw.choice([draw.randrange(edges[0]), draw.randrange(*edges[:2]), draw.randrange(*edges[1:])])] ^= 255
        file.write_bytes(damaged)
        try:
            _Parts(read_header(file))
        except ModelError as error:
            told.append(str(error))
    assert 20 < len(told) < 80
    assert not [message for message in told if "\n" in message]


def test_a_damaged_count_of_layers_is_refused_before_its_names_are_made(tmp_path: Path):
    file = write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32")
    key = b"llama.block_count"
    damaged = bytearray(file.read_bytes())
    # After the key stand a type and the count, four bytes each.
    count = damaged.index(key) + len(key) + 4
    damaged[count : count + 4] = (2**31 - 1).to_bytes(4, "little")
    file.write_bytes(damaged)
    with pytest.raises(BrokenCheckpoint, match="tensors of 2147483647 layers"):
        _Parts(read_header(file))


def test_other_architectures_are_refused_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pat_serve.gguf.weights.read_rows", None)
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", "F32", architecture="gemma2")
    with pytest.raises(UnsupportedModel, match=r"of the architecture gemma, llama, .* found gemma2\. Choose"):
        locate(str(file))
    for missing, message in (
        ("model.layers.1.mlp.up_proj.weight", r"expected the tensor blk\.1\.ffn_up\.weight, found no such"),
        ("model.embed_tokens.weight", r"expected the tensor token_embd\.weight, found no such"),
    ):
        write_gguf(base, file, "F32", leave_out=(missing,))
        with pytest.raises(BrokenCheckpoint, match=message):
            locate(str(file))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, cache: Path):
    base = save_tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / "model.safetensors")
    before = set((cache / "gguf").glob("*-*"))
    with pytest.raises(BrokenCheckpoint, match=r"finite numbers in blk\.1\.ffn_down\.weight, found NaN"):
        locate(str(write_gguf(base, tmp_path / "model.gguf", "F32")))
    assert set((cache / "gguf").glob("*-*")) == before


def test_without_the_gguf_package_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", "F32")
    monkeypatch.setattr("pat_serve.machine.extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtra, match=r'pip install "pat-serve\[gguf\]"'):
        locate(str(file))


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_gguf(save_tiny_llama(tmp_path / "base", seed=3), tmp_path / "model.gguf", "F32")
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("PAT_SERVE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(UsageError, match="Name another one in PAT_SERVE_CACHE"):
        locate(str(file))
