"""Turn a finished float32 export into a quantised one, tensor by tensor.

The source is the exact rewriting in float32, so that quantised weights come from the exact ones and not from 16-bit
ones.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_serve.checkpoints.shard_layout import shard_names
from pat_serve.checkpoints.shards import TensorEntry, read_header
from pat_serve.export.formats.calibrated import Rounded, round_layers
from pat_serve.export.formats.overflow import round_floats
from pat_serve.export.formats.quality import QuantizationQuality, measure_quality
from pat_serve.export.formats.schemes import (
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    SHAPE_SUFFIX,
    Scheme,
    quantization_config,
    quantize_channels,
)
from pat_serve.export.parity.prompts import own_prompts
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.terminal.progress import track

_INDEX = "model.safetensors.index.json"
HEADER_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of the quantised checkpoint, before it is there.

    Attributes:
        source: name of the float32 tensor that it is made from.
        dtype: as it will be stored.
        shape: its shape.
    """

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def quantize_export(
    run: Run,
    folder: Path,
    scheme: Scheme,
    model_dtype: torch.dtype,
    max_shard_bytes: int,
    out: Path,
    judge: bool,
    calibration: list[list[int]],
) -> QuantizationQuality | None:
    """Replace the float32 weights of a finished export by quantised ones.

    Args:
        run: the run that it comes from; its own prompts are what is measured on, not the random ones.
        folder: with config.json and float32 weights.
        scheme: the scheme.
        model_dtype: dtype of what is not quantised.
        max_shard_bytes: size of a weight file at most.
        out: what the folder will be called, for messages.
        judge: measure what quantisation costs.
        calibration: token ids whose inputs a calibrated scheme rounds the weights for.

    Raises:
        ParityError: it costs more than the scheme may.
        BrokenCheckpoint: a value that does not fit into `model_dtype`.
    """
    quantized = folder / f".{scheme.name}"
    quantized.mkdir()
    rounded = None
    if scheme.group_size is not None:
        rounded = round_layers(folder, calibration, scheme.group_size, model_dtype)
    quantize_folder(folder, quantized, scheme, model_dtype, max_shard_bytes, rounded)
    quality = measure_quality(folder, quantized, scheme, own_prompts(run)) if judge else None
    if quality is not None:
        lost = f"Nothing was exported: this model loses too much in {scheme.bits} bits."
        quality.require(out, f"{lost} Export it without --quantize.")
    replace_weights(folder, quantized)
    return quality


def quantize_folder(
    exact: Path,
    out: Path,
    scheme: Scheme,
    model_dtype: torch.dtype,
    max_shard_bytes: int,
    rounded: Mapping[str, Rounded] | None = None,
) -> None:
    """Write the quantised twin of a float32 checkpoint.

    Args:
        exact: a folder with config.json and float32 weights.
        out: an empty folder, which gets config.json and the quantised weights.
        scheme: the scheme.
        model_dtype: dtype of what is not quantised: embedding, head, norms, biases.
        max_shard_bytes: size of a weight file at most.
        rounded: the weights of a calibrated scheme, by name.

    Raises:
        BrokenCheckpoint: a value that does not fit into `model_dtype`.
    """
    where = _sources(exact)
    shards = _plan_shards(_stored(where, scheme, model_dtype), max_shard_bytes)
    files = shard_names(len(shards))
    total = sum(len(shard) for shard in shards)
    done = track(_tensors(shards, where, scheme, model_dtype, rounded or {}), f"write {scheme.name} weights", total)
    for file, shard in zip(files, shards, strict=True):
        _write_shard(out / file, shard, done)
    config: dict[str, Any] = json.loads((exact / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(model_dtype).removeprefix("torch."), "quantization_config": quantization_config(scheme)}
    _write_json(out / "config.json", config)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size_bytes for shard in shards for entry in shard.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        _write_json(out / _INDEX, index)


def replace_weights(folder: Path, quantized: Path) -> None:
    """Put the quantised weights and config into the place of the float32 ones, and remove their folder."""
    for path in [*folder.glob("*.safetensors"), *folder.glob(_INDEX)]:
        path.unlink()
    for path in quantized.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(quantized)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """The tensor is the weight of a linear inside the decoder layers."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and len(shape) == 2 and module not in (EMBEDDING, HEAD)


def _sources(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint, in order."""
    found = {name: entry for path in sorted(folder.glob("*.safetensors")) for name, entry in read_header(path).items()}
    assert {entry.dtype for entry in found.values()} == {torch.float32}
    return found


def _stored(where: dict[str, TensorEntry], scheme: Scheme, model_dtype: torch.dtype) -> Iterator[tuple[str, Stored]]:
    for name, entry in where.items():
        shape = entry.shape
        if is_quantized(name, shape):
            for suffix, (dtype, part) in scheme.parts(shape, model_dtype).items():
                yield name + suffix, Stored(source=name, dtype=dtype, shape=part)
        else:
            yield name, Stored(source=name, dtype=model_dtype, shape=shape)


def _plan_shards(entries: Iterator[tuple[str, Stored]], max_shard_bytes: int) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    filled_bytes = 0
    for name, entry in entries:
        if shards[-1] and filled_bytes + entry.size_bytes > max_shard_bytes:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = entry
        filled_bytes += entry.size_bytes
    return shards


def _tensors(
    shards: list[dict[str, Stored]],
    where: dict[str, TensorEntry],
    scheme: Scheme,
    model_dtype: torch.dtype,
    rounded: Mapping[str, Rounded],
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors in order, one weight in memory at a time; the parts of a weight follow each other."""
    parts: dict[str, Tensor] = {}
    for shard in shards:
        for name, entry in shard.items():
            source = where[entry.source]
            if not is_quantized(entry.source, source.shape):
                yield name, round_floats(source.read(), model_dtype, name)
                continue
            if not parts:
                parts = _parts(entry.source, source, scheme, rounded)
            yield name, parts.pop(name.removeprefix(entry.source))


def _parts(name: str, source: TensorEntry, scheme: Scheme, rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    """The tensors in the place of a linear's weight, by what is appended to its name."""
    if scheme.group_size is None:
        stored_OI, scale_O1 = quantize_channels(source.read(), scheme)
        return {"": stored_OI, SCALE_SUFFIX: scale_O1}
    found = rounded[name]
    return {PACKED_SUFFIX: found.packed, SCALE_SUFFIX: found.scale, SHAPE_SUFFIX: torch.tensor(source.shape)}


def _write_shard(path: Path, shard: dict[str, Stored], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One safetensors file of tensors of several dtypes; the header is written before any tensor is there."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in shard.items():
        end = offset + entry.size_bytes
        header[name] = {
            "dtype": HEADER_DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for expected, entry in shard.items():
            name, tensor = next(tensors)
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, entry.dtype, entry.shape), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
