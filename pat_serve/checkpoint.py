"""A Hugging Face checkpoint on disk: found, checked against its family's table, and read one tensor at a time.

Everything is checked from the safetensors headers before a weight is read: a truncated shard, a tensor that is missing,
unknown or of the wrong shape is an error of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pat_serve.architectures import EMBEDDING, FAMILIES, Family
from pat_serve.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from pat_serve.locate import commit_of, locate, read_config
from pat_serve.plan import BaseReference, file_sha256
from pat_serve.recognize import family_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies and what it is, from a shard's header."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        source: what the user called it: a folder or a hub id.
        revision: the hub's commit, or what was asked for where the folder does not tell it; None for a local folder.
        folder: where it lies on disk.
        config: its config.json.
        family: its line in the architecture table.
        tensors: every weight by name, in the shards' order.
    """

    source: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    family: Family
    tensors: dict[str, TensorEntry]

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        """Size of one attention head, explicit or by the config class's rule."""
        return int(self._setting("head_dim") or self.hidden_size // self.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads."""
        return int(self._setting("num_key_value_heads") or self.num_attention_heads)

    @property
    def tied(self) -> bool:
        """The output head is the embedding table."""
        return bool(self._setting("tie_word_embeddings"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights (the embedding's, when they differ)."""
        return self.tensors[f"{EMBEDDING}.weight"].dtype

    def _setting(self, name: str) -> Any:
        """A setting of config.json, or what the stock class fills in when the file leaves it out."""
        return self.config.get(name, self.family.defaults.get(name))

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        return read_tensor(self.tensors[name].shard, name)

    def shards(self) -> list[Path]:
        """Its weight files, in order."""
        return sorted({entry.shard for entry in self.tensors.values()})

    def reference(self) -> BaseReference:
        """Identity of this checkpoint, with the SHA-256 of every file that decides what it computes."""
        files = [self.folder / "config.json", *self.shards()]
        return BaseReference(
            source=str(Path(self.source).resolve()) if Path(self.source).is_dir() else self.source,
            revision=self.revision,
            architecture=self.family.architecture,
            sha256={path.name: file_sha256(path) for path in files},
        )


def tensor_names(shard: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def read_tensor(shard: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, as it is stored."""
    with safe_open(shard, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check all that its headers tell.

    Raises:
        MissingModel: it is not there.
        UnsupportedModel: its family is not in the table.
        BrokenCheckpoint: a shard is missing, truncated or damaged, or a tensor is missing or of another shape.
        UnknownTensor: it holds a tensor that its family does not have.
    """
    if not Path(source).is_dir():
        # A model that is refused by its config alone need not be downloaded.
        family_of(read_config(locate(source, revision, weights=False)), source)
    folder = locate(source, revision)
    config = read_config(folder)
    family = family_of(config, source, [] if config.get("model_type") in FAMILIES else _names(folder, source))
    _check_config(config, folder)
    tensors: dict[str, TensorEntry] = {}
    for shard in _shards(folder, source):
        for name, entry in _read_header(shard):
            if not family.ignores(name):
                tensors[name] = entry
    checkpoint = Checkpoint(
        source=source,
        revision=commit_of(folder) or revision,
        folder=folder,
        config=config,
        family=family,
        tensors=tensors,
    )
    _check_tensors(checkpoint)
    return checkpoint


def _names(folder: Path, source: str) -> list[str]:
    """Names of all tensors, or of none when the weights cannot be read."""
    try:
        return [name for shard in _shards(folder, source) for name, _ in _read_header(shard)]
    except ModelError:
        return []


def _shards(folder: Path, source: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _broken(index, "a safetensors index with a weight_map", str(error)) from error
        for name in names:
            # A name with a separator could lead out of the folder.
            if Path(name).name != name or not (folder / name).is_file():
                raise _broken(index, f"the shard {name} beside it", "no such file")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    raise UnsupportedModel(
        source,
        expected="model.safetensors, or shards with model.safetensors.index.json",
        found=f"pickled weights ({pickles[0]})" if pickles else "no weights",
        fix="Save the model in safetensors format; pickles are never loaded." if pickles else "Copy the model again.",
    )


def _read_header(shard: Path) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor of a shard, from its header; the file's length must be what the header says."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise _broken(shard, "a safetensors file", f"a header of {length} bytes in a file of {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(shard, "a safetensors header", str(error)) from error
    if size != 8 + length + end:
        raise _broken(shard, f"{8 + length + end} bytes, as its header says", f"{size} bytes (truncated or damaged)")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise _broken(shard, f"{name} in {', '.join(DTYPES)}", str(entry["dtype"]))
        yield name, TensorEntry(shard=shard, dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))


def _check_config(config: dict[str, Any], folder: Path) -> None:
    """Everything that training and export read from a config is there, before either begins."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise _broken(folder / "config.json", f"{name} as a positive integer", repr(value))
    if not isinstance(config.get("rms_norm_eps"), int | float):
        raise _broken(folder / "config.json", "rms_norm_eps as a number", repr(config.get("rms_norm_eps")))


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor is known and of the shape that the config gives it, and none is missing."""
    heads, kv_heads = checkpoint.num_attention_heads, checkpoint.num_key_value_heads
    ffn = int(checkpoint.config["intermediate_size"])
    widths = {
        "hidden": checkpoint.hidden_size,
        "vocab": int(checkpoint.config["vocab_size"]),
        "head": checkpoint.head_dim,
        "heads": heads * checkpoint.head_dim,
        "kv_heads": kv_heads * checkpoint.head_dim,
        "qkv": (heads + 2 * kv_heads) * checkpoint.head_dim,
        "ffn": ffn,
        "gate_up": 2 * ffn,
    }
    for name, entry in checkpoint.tensors.items():
        spec, layer, kind = checkpoint.family.match(name)
        if layer is not None and layer >= checkpoint.num_layers:
            raise _broken(entry.shard, f"{checkpoint.num_layers} layers, as config.json says", f"the tensor {name}")
        axes = spec.axes if kind == "weight" else spec.axes[:1]
        shape = tuple(widths[axis.partition(".")[0]] for axis in axes)
        if entry.shape != shape:
            raise _broken(entry.shard, f"{name} of shape {shape}, by config.json", str(entry.shape))
    missing = checkpoint.family.expected_tensors(checkpoint.num_layers, tied=checkpoint.tied) - set(checkpoint.tensors)
    if missing:
        example = sorted(missing)[0]
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise _broken(checkpoint.folder, f"the tensor {example}{more}", "no such tensor in its shards")


def _broken(path: Path, expected: str, found: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(path, expected=expected, found=found, fix="Copy or download the model again.")
