"""GGUF files of tiny models, written as llama.cpp's converter and quantiser lay them out.

Nothing of the package's own GGUF code is used: names, row orders and blocks are written down here once more, from
llama.cpp's convert_hf_to_gguf.py and ggml-common.h. The gguf package quantises the simple types; those of K-quants,
which it can only read, are packed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Which type each tensor of a mixture has; llama.cpp's Q4_K_M gives some of them more bits.
_MIXTURES = {"Q4_K_M": ("Q4_K", {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output": "Q6_K"})}


def write_gguf(
    folder: Path, path: Path, kind: str = "F16", *, architecture: str = "llama",
    change: Callable[[Any], None] | None = None, leave_out: tuple[str, ...] = (), pre: str = "gpt-2",
    sentencepiece: Path | None = None,
) -> Path:  # fmt: skip
    """Write a saved tiny model as GGUF.

    Args:
        folder: of the model, one shard.
        path: of the file.
        kind: F32, F16, BF16, a type that the gguf package quantises to, or Q4_K_M.
        architecture: llama.cpp's name.
        change: called with the writer after the usual metadata, to add to it.
        leave_out: stock names of tensors to be left out.
        pre: llama.cpp's name of the pre-tokenizer.
        sentencepiece: a tokenizer.model to take the tokens of, in the place of the folder's byte-level BPE.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    if head_dim * heads != config["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if sentencepiece is None:
        _add_byte_level(writer, folder, config["vocab_size"], pre)
    else:
        _add_sentencepiece(writer, sentencepiece)
    if change is not None:
        change(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name in leave_out:
            continue
        theirs, values = gguf_name(name), tensor.float().numpy()
        if architecture == "llama" and ".attn_q." in theirs:
            values = permuted(values, heads)
        if architecture == "llama" and ".attn_k." in theirs:
            values = permuted(values, kv_heads)
        if architecture == "gemma" and "norm" in theirs:
            values = values + 1
        add(writer, theirs, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.{part}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.{part}"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The same as LlamaModel.permute of convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    """A tensor in its type; norms and biases are always float32."""
    if kind in _MIXTURES:
        most, others = _MIXTURES[kind]
        kind = others.get(name.split(".")[-2], most)
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, values.astype(np.float32))
        return
    number = gguf.GGMLQuantizationType[kind]
    if kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    elif kind in _PACKERS:
        writer.add_tensor(name, _PACKERS[kind](values), raw_dtype=number)
    else:
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)


def _add_sentencepiece(writer: Any, path: Path) -> None:
    """The same as LlamaModel._set_vocab_sentencepiece of convert_hf_to_gguf.py."""
    pieces = SentencePieceProcessor(str(path))
    kinds = {pieces.IsUnknown: 2, pieces.IsControl: 3, pieces.IsUnused: 5, pieces.IsByte: 6}
    ids = range(pieces.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.IdToPiece(index) for index in ids])
    writer.add_token_scores([pieces.GetScore(index) for index in ids])
    writer.add_token_types([next((kind for test, kind in kinds.items() if test(index)), 1) for index in ids])
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())


def _add_byte_level(writer: Any, folder: Path, size: int, pre: str) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    tokens, types = [f"[PAD{index}]" for index in range(size)], [5] * size
    for token, index in document["model"]["vocab"].items():
        tokens[index], types[index] = token, 1
    for added in document["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)


def q4_k(values: np.ndarray) -> np.ndarray:
    """block_q4_K of ggml-common.h: 256 values in 144 bytes, 8 scales and 8 minima of 6 bits, two values a byte."""
    blocks = values.reshape(-1, 8, 32).astype(np.float64)
    low = np.minimum(blocks.min(2), 0)
    steps, minima = (blocks.max(2) - low) / 15, -low
    d, dmin = (np.maximum(part.max(1), 1e-12).astype(np.float64) / 63 for part in (steps, minima))
    d, dmin = d.astype(np.float16), dmin.astype(np.float16)
    scale = np.clip(np.rint(steps / np.maximum(d[:, None].astype(float), 1e-12)), 0, 63).astype(np.uint8)
    minimum = np.clip(np.rint(minima / np.maximum(dmin[:, None].astype(float), 1e-12)), 0, 63).astype(np.uint8)
    step = np.maximum(d[:, None].astype(float) * scale, 1e-12)
    codes = np.clip(np.rint((blocks + (dmin[:, None].astype(float) * minimum)[..., None]) / step[..., None]), 0, 15)
    return pack_q4_k(d, dmin, scale, minimum, codes.astype(np.uint8)).reshape(values.shape[0], -1)


def pack_q4_k(d: np.ndarray, dmin: np.ndarray, scale: np.ndarray, minimum: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bytes of blocks: d and dmin (N,) float16, scale and minimum (N, 8) below 64, codes (N, 8, 32) below 16."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    third = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    pairs = codes.reshape(len(codes), 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), 128)
    halves = np.stack([d, dmin], axis=1).astype("<f2").view(np.uint8)
    return np.concatenate([halves, first, second, third, nibbles], axis=1).astype(np.uint8)


def q6_k(values: np.ndarray) -> np.ndarray:
    """block_q6_K of ggml-common.h: 256 values in 210 bytes, 16 signed scales of 8 bits, codes of 6 bits."""
    blocks = values.reshape(-1, 16, 16).astype(np.float64)
    steps = np.abs(blocks).max(2) / 31
    d = (np.maximum(steps.max(1), 1e-12) / 127).astype(np.float16)
    scale = np.clip(np.rint(steps / np.maximum(d[:, None].astype(float), 1e-12)), 1, 127).astype(np.int8)
    step = np.maximum(d[:, None].astype(float) * scale, 1e-12)
    codes = np.clip(np.rint(blocks / step[..., None]), -32, 31).astype(np.int64) + 32
    return pack_q6_k(d, scale, codes.astype(np.uint8)).reshape(values.shape[0], -1)


def pack_q6_k(d: np.ndarray, scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bytes of blocks: d (N,) float16, scale (N, 16) int8, codes (N, 16, 16) below 64."""
    # Two halves of 128 values, each of four runs of 32.
    runs = codes.reshape(len(codes), 2, 4, 32)
    low = np.concatenate([(runs[:, :, :2] & 15) | (runs[:, :, 2:] & 15) << 4], axis=2).reshape(len(codes), 128)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = np.bitwise_or.reduce((runs >> 4) << shifts, axis=2).reshape(len(codes), 64)
    tail = d.astype("<f2")[:, None].view(np.uint8)
    return np.concatenate([low, high, scale.view(np.uint8), tail], axis=1).astype(np.uint8)


_PACKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": q4_k, "Q6_K": q6_k}
