"""The weight files of a folder: found, checked by their headers, and read in runs of rows.

Nothing here trusts a file. A header's offsets must cover the file from its first byte to its last without gap or
overlap, an index and its shards must name the same tensors, and no link may lead out of the folder.

Reads go through pread into a buffer and not through a memory map: mapped pages count as the process's own as long as
the map lives, so a map of the largest tensor would cost its size in memory.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_serve.checkpoints.locate import check_inside
from pat_serve.errors import BrokenCheckpoint, UnsupportedModel, first_line
from pat_serve.files.strict_json import parse

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The safetensors library has the same bound; a header of 100 MB names about a million tensors.
LONGEST_HEADER_BYTES = 100_000_000
_FIX = "Copy or download the model again."


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """The place, dtype and shape of a tensor, from a shard's header.

    Attributes:
        shard: the file.
        dtype: as it is stored.
        shape: as it is stored, row-major.
        offset_bytes: of its first byte in the file.
    """

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """The tensor's size on the disk, in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None, buffer: Tensor | None = None) -> Tensor:
        """Read the rows from start to stop (all by default), as they are stored.

        Args:
            start: first row.
            stop: one behind the last row.
            buffer: uint8 memory to read into, at least as large; the result is a view of it. New memory by default.

        Raises:
            BrokenCheckpoint: the file has become shorter than its header says.
        """
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        assert 0 <= start <= stop <= rows
        row_bytes = self.size_bytes // max(rows, 1)
        wanted = (stop - start) * row_bytes
        memory = torch.empty(wanted, dtype=torch.uint8) if buffer is None else buffer[:wanted]
        _fill(self.shard, self.offset_bytes + start * row_bytes, memory)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return memory.view(self.dtype).view(shape)


def read_header(shard: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, TensorEntry]:
    """List every tensor of a safetensors file, in the order of their bytes.

    Args:
        shard: the file.
        dtypes: dtypes that the file may hold, by their names in the header.

    Raises:
        BrokenCheckpoint: the file is of another kind or truncated, or its header is wrong about it.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, LONGEST_HEADER_BYTES):
            raise broken(shard, "a safetensors file", f"a header of {length} bytes in a file of {size} bytes")
        encoded = file.read(length)
    try:
        header = parse(encoded)
    except ValueError as error:
        raise broken(shard, "a safetensors header", first_line(error)) from error
    if not isinstance(header, dict):
        raise broken(shard, "a safetensors header", f"a JSON {type(header).__name__}")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = sorted(
        (_entry(shard, name, value, start, dtypes) for name, value in header.items()),
        key=lambda entry: entry[1].offset_bytes,
    )
    end = start
    for name, entry in entries:
        if entry.offset_bytes != end:
            what = "overlapping" if entry.offset_bytes < end else "a gap"
            raise broken(shard, f"{name} to begin at byte {end}", f"byte {entry.offset_bytes} ({what})")
        end += entry.size_bytes
    if size != end:
        raise broken(shard, f"{end} bytes, as its header says", f"{size} bytes (truncated or damaged)")
    return dict(entries)


def indexed_shards(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """List the weight files that an index names, and check that they are there.

    Raises:
        BrokenCheckpoint: the index names a file that is not there, or leads out of its folder.
    """
    names = sorted(set(weight_map.values()))
    for name in names:
        # A name with a separator could lead out of the folder.
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise broken(index, f"the shard {name!r:.80} beside it", "no such file")
    return [index.parent / name for name in names]


def find_shards(folder: Path, source: object) -> list[Path]:
    """Find the weight files of a folder, from its index if it has one.

    Raises:
        UnsupportedModel: the folder has pickled weights or none.
        BrokenCheckpoint: the index is damaged, names a file that is not there, or leads out of the folder.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        shards = indexed_shards(index, read_index(index))
        if single.is_file() and shards != [single]:
            # transformers would read one of them, and other loaders the other.
            raise broken(
                folder, f"{SINGLE} or {INDEX}", "both", fix="Delete the one that does not belong to the model."
            )
    elif single.is_file():
        shards = [single]
        # vLLM reads every such file where no index says which.
        if stray := sorted(path.name for path in folder.glob("[!.]*.safetensors") if path != single):
            found = f"{stray[0]} beside it and no {INDEX}"
            raise broken(folder, f"{SINGLE} alone", found, fix="Move away what does not belong to the model.")
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise UnsupportedModel(
            source,
            expected=f"{SINGLE}, or shards with {INDEX}",
            found=f"pickled weights ({pickles[0]})" if pickles else "no weights",
            fix="Save the model in safetensors format; pickles are never loaded." if pickles else "Copy it again.",
        )
    check_inside(folder, [*shards, *([index] if index.is_file() else [])])
    return shards


def runtime_shards(folder: Path) -> list[Path]:
    """List the weight files that vLLM opens in a folder: those that an index names, or all without an index.

    Raises:
        BrokenCheckpoint: an index names a file that is not there, or is no index.
        UnsupportedModel: vLLM finds no file in a folder of this name.
    """
    require_no_pattern(folder)
    if (folder / INDEX).is_file():
        # The index is read as leniently as vLLM reads it.
        return indexed_shards(folder / INDEX, read_index(folder / INDEX, json.loads))
    # vLLM does not look at hidden files either.
    return sorted(folder.glob("[!.]*.safetensors"))


def require_no_pattern(folder: Path) -> None:
    """Refuse a path with signs of a pattern: vLLM looks for weight files by a pattern that begins with the path.

    Raises:
        UnsupportedModel: the path has such a sign.
    """
    if glob.has_magic(str(folder)):
        raise UnsupportedModel(
            folder,
            expected="a path without *, ? and [, which vLLM takes for a pattern",
            found="a path with one of them",
            fix="Rename the folder, or give a link to it that has another name.",
        )


def read_index(index: Path, load: Callable[[bytes], Any] = parse) -> dict[str, str]:
    """Read the weight_map of a model.safetensors.index.json: the file of each tensor.

    Args:
        index: the file.
        load: how its JSON is read; by default no name may come twice.

    Raises:
        BrokenCheckpoint: the index has no weight_map.
    """
    try:
        document = load(index.read_bytes())
        weights = document["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise broken(index, "a safetensors index with a weight_map", first_line(error)) from error
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise broken(index, "a weight_map from tensors to files", "something else")
    return weights


def read_tensors(
    folder: Path, source: object, ignored: Callable[[str], bool], dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, TensorEntry]:
    """List every tensor of a checkpoint's folder by name, in the shards' order.

    Args:
        folder: folder of the checkpoint.
        source: what the user called it.
        ignored: names of leftovers that no loader reads.
        dtypes: dtypes that the shards may hold, by their names in a header.

    Raises:
        UnsupportedModel: as `find_shards` does.
        BrokenCheckpoint: a shard is damaged, two hold the same tensor, or index and shards disagree.
    """
    tensors: dict[str, TensorEntry] = {}
    for shard in find_shards(folder, source):
        for name, entry in read_header(shard, dtypes).items():
            if ignored(name):
                continue
            if name in tensors:
                raise broken(shard, f"the tensor {name} once", f"another one in {tensors[name].shard.name}")
            tensors[name] = entry
    index = folder / INDEX
    if index.is_file():
        weights = {name: file for name, file in read_index(index).items() if not ignored(name)}
        for name in sorted(weights.keys() | tensors.keys()):
            found = tensors[name].shard.name if name in tensors else "no shard"
            if weights.get(name) != found:
                raise broken(index, f"the tensor {name} in {weights.get(name, 'no shard')}", f"it in {found}")
    return tensors


def broken(path: Path, expected: str, found: str, fix: str = _FIX) -> BrokenCheckpoint:
    """Make the error of a damaged file."""
    return BrokenCheckpoint(path, expected=expected, found=found, fix=fix)


def _entry(
    shard: Path, name: str, value: Any, start: int, dtypes: Mapping[str, torch.dtype]
) -> tuple[str, TensorEntry]:
    """Check one entry of a header; `start` is the first byte of the data in the file."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        extra = set(value) - {"dtype", "shape", "data_offsets"}
    except (KeyError, TypeError, ValueError) as error:
        raise broken(shard, f"dtype, shape and data_offsets of {name}", first_line(error)) from error
    numbers = (*shape, begin, end)
    # bool is an int to Python.
    if extra or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise broken(shard, f"dtype, shape and data_offsets of {name}", f"{value!r:.120}")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise broken(shard, f"{name} in {', '.join(dtypes)}", f"{dtype!r:.40}")
    size = prod(shape) * dtypes[dtype].itemsize
    if end - begin != size:
        raise broken(shard, f"{size} bytes for {name}, {dtype} of shape {shape}", f"{end - begin} bytes")
    return name, TensorEntry(shard=shard, dtype=dtypes[dtype], shape=shape, offset_bytes=start + begin)


def _fill(path: Path, offset: int, memory: Tensor) -> None:
    """Read exactly as many bytes as the memory holds."""
    view = memory.numpy().data
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise broken(path, f"{offset + len(view)} bytes, as its header said", f"{offset + done} bytes")
            done += count
    finally:
        os.close(descriptor)
