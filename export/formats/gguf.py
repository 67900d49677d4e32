"""Write a finished float export as one GGUF file too, for llama.cpp and what is built on it.

Llamas alone (Mistrals without a sliding window and exported Qwen2s are Llamas to llama.cpp). A pruned model has
heads x head_dim != hidden_size, which GGUF states as attention.key_length and value_length.

The export refuses everything that no test could show right, and does not guess: other architectures, scaled ropes, and
tokenizers whose pre-tokenizer llama.cpp would have to be told by a name that does not stand in tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from pat_serve.checkpoints.checkpoint import read_tensor, tensor_names
from pat_serve.errors import BrokenCheckpoint, MissingExtra, UnsupportedModel, UsageError, first_line
from pat_serve.families.architectures import FAMILIES
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import track

GGUF_FILE = "model.gguf"
# Split patterns of tokenizer.json and what llama.cpp calls them.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CONTROL, _NORMAL, _USER_DEFINED = 3, 1, 4


def require_gguf(config: dict[str, Any], base: Path, *, quantized: bool) -> None:
    """Raise unless a model of this config can be written as GGUF; asked before anything is written.

    Raises:
        MissingExtra: the gguf package is not there.
        UnsupportedModel: a model or tokenizer that is not known to come out right.
        UsageError: 8-bit weights.
    """
    if find_spec("gguf") is None:
        raise MissingExtra("--gguf", expected="the package gguf", found="none", fix='Install "pat-serve[gguf]".')
    if quantized:
        raise UsageError(
            "--gguf", expected="float weights", found="--quantize", fix="Quantise the GGUF file with llama-quantize."
        )
    _check_config(config, base)
    _read_tokenizer(base)


def write_gguf(folder: Path) -> Path:
    """Write model.gguf beside the safetensors of a finished export, in their dtype, one tensor at a time.

    Args:
        folder: with config.json, float weights and the tokenizer.

    Raises:
        UnsupportedModel: a model or tokenizer that is not known to come out right.
        BrokenCheckpoint: tokenizer.json contradicts config.json.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_config(config, folder)
    path = folder / GGUF_FILE
    writer = gguf.GGUFWriter(path, "llama")
    sizes = ModelSizes.of(config, FAMILIES[str(config["model_type"])], folder)
    _add_config(writer, config, sizes)
    _add_tokenizer(writer, folder, sizes.vocab)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.layers)
    shards = [(shard, name) for shard in sorted(folder.glob("*.safetensors")) for name in tensor_names(shard)]
    for _, name, array, raw in _arrays(shards, sizes, data=False):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor_info(target, array.shape, array.dtype, array.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, array, _ in track(_arrays(shards, sizes, data=True), "write GGUF", len(shards)):
        writer.write_tensor_data(array)
    writer.close()
    return path


def permute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj, or of its bias, in llama.cpp's order: rotated pairs side by side.

    Args:
        weight: (heads * head_dim, ...).
        heads: query or key-value heads.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _check_config(config: dict[str, Any], folder: Path) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "model_type": (config["model_type"] not in ("llama", "mistral"), config["model_type"], "llama or mistral"),
        "sliding_window": (config.get("sliding_window") is not None, config.get("sliding_window"), "none"),
        "rope_type": (kind != "default", kind, "default"),
    }
    for setting, (wrong, found, expected) in refused.items():
        if wrong:
            raise UnsupportedModel(
                folder,
                expected=f"{setting} {expected} for GGUF",
                found=str(found),
                fix="Leave --gguf out; docs/formats.md says what it covers.",
            )


def _add_config(writer: Any, config: dict[str, Any], sizes: ModelSizes) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(sizes.vocab)


def _read_tokenizer(folder: Path) -> tuple[dict[str, Any], str]:
    """tokenizer.json of a byte-level BPE, and llama.cpp's name of its pre-tokenizer."""
    path = folder / "tokenizer.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind, pattern = document["model"]["type"], _pattern_name(document.get("pre_tokenizer"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(
            path, expected="a tokenizer", found=first_line(error), fix="Leave --gguf out, or copy the model again."
        ) from error
    if pattern is None or kind != "BPE" or document.get("normalizer"):
        raise UnsupportedModel(
            path,
            expected="a byte-level BPE with the pre-tokenizer of GPT-2 or Llama 3 for GGUF",
            found=f"{kind} with another one",
            fix="Leave --gguf out; docs/formats.md says what it covers.",
        )
    return document, pattern


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    import gguf

    document, pattern = _read_tokenizer(folder)
    # Rows that no token uses still need a name.
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [5] * size  # unused
    for token, index in document["model"]["vocab"].items():
        if index >= size:
            raise BrokenCheckpoint(
                folder / "tokenizer.json",
                expected=f"token ids below vocab_size {size}",
                found=str(index),
                fix="Copy the model again.",
            )
        tokens[index], kinds[index] = token, _NORMAL
    for added in document["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    # The ids that tokenizer.json really adds to a text; without them llama.cpp goes by the pre-tokenizer's name.
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    special.add_special_token = {
        "bos": ids[0] == special.special_token_ids.get("bos"),
        "eos": ids[-1] == special.special_token_ids.get("eos"),
    }
    special.add_to_gguf(writer, quiet=True)


def _pattern_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a pre-tokenizer; None for one that is not known to be the same."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if any(part.get("add_prefix_space") for part in parts):
        return None
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"] == {"Regex": _LLAMA3_PATTERN}:
        return "llama-bpe"
    return None


def _arrays(shards: list[tuple[Path, str]], sizes: ModelSizes, *, data: bool) -> Iterator[tuple[Path, str, Any, Any]]:
    """Each tensor as numpy and as GGUF calls its dtype; without `data` the values mean nothing and take no time."""
    import gguf

    raw_dtypes = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
        torch.float64: gguf.GGMLQuantizationType.F32,
    }
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}
    for shard, name in shards:
        tensor = read_tensor(shard, name)
        module = name.split(".")[-2]
        if data and module in heads:
            tensor = permute_rotary(tensor, heads[module])
        # llama.cpp wants norms and biases in float32.
        dtype = torch.float32 if tensor.dim() == 1 or tensor.dtype == torch.float64 else tensor.dtype
        tensor = tensor.to(dtype).contiguous()
        array = tensor.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else tensor.numpy()
        yield shard, name, array, raw_dtypes[dtype]
