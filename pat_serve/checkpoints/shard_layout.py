"""Lay out the weights of a checkpoint in safetensors files: file, header and byte of each. Pure arithmetic."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod

import torch

from pat_serve.checkpoints.shards import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Split tensors into shards, in order; a tensor larger than a shard has one of its own."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = prod(shape) * dtype.itemsize
        if shards[-1] and filled_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += tensor_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_document(
    shards: list[list[str]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, object]:
    """model.safetensors.index.json of a sharded checkpoint."""
    files = shard_names(len(shards))
    return {
        "metadata": {"total_size": sum(prod(shape) for shape in shapes.values()) * dtype.itemsize},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }


def encode_header(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Encode a safetensors header, and give the place of each tensor behind it: first byte, and one past the last."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[int, int]] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name] = (offset, end)
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, offsets
