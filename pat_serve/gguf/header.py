"""Read the part of a GGUF file before its weights: metadata, and the place of each tensor.

The layout is llama.cpp's, versions 2 and 3, little-endian: magic, version, counts, metadata, tensor table, data. The
gguf package has a reader too; it takes seconds for a vocabulary, since it keeps every token as an array of its own, and
its messages for a file that is cut off name neither the file nor the tensor.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pat_serve.errors import BrokenCheckpoint, UnsupportedModel, first_line

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# llama.cpp's GGML_MAX_DIMS.
_MOST_DIMENSIONS = 4
_SPLIT_NAME = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_FIX = "Copy or download the file again."


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """The place of a tensor in the file, and its type.

    Attributes:
        name: llama.cpp's name of the tensor.
        kind: name of its type: F32, Q4_K and so on.
        shape: row-major, as in safetensors.
        offset_bytes: place of its first byte in the file.
        size_bytes: size on the disk.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """A file's metadata by llama.cpp's keys, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family."""
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> GgufHeader:
    """Read everything before the weights, and no weight.

    Raises:
        BrokenCheckpoint: the file is no GGUF file, or is cut off or damaged.
        UnsupportedModel: the file is one part of several, or its version or a tensor type is not covered.
    """
    if _SPLIT_NAME.fullmatch(path.name):
        raise _split(path)
    if path.stat().st_size < len(_MAGIC) + 20:
        raise broken(path, "a GGUF file", f"{path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(_MAGIC)] != _MAGIC:
            raise broken(path, "a GGUF file", f"one that begins with {data[: len(_MAGIC)]!r}")
        cursor = _Cursor(data)
        version, tensor_count, field_count = cursor.scalars("IQQ")
        if version not in _VERSIONS:
            raise UnsupportedModel(
                path,
                expected=f"GGUF version {' or '.join(map(str, _VERSIONS))}, little-endian",
                found=f"version {version}",
                fix="Convert the model again with a current llama.cpp.",
            )
        try:
            metadata = {cursor.string(): cursor.value() for _ in range(field_count)}
            table = [_table_entry(cursor) for _ in range(tensor_count)]
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError) as error:
            found = f"an end at byte {len(data)}" if isinstance(error, struct.error) else first_line(error)
            raise broken(path, "a whole GGUF header", f"{found} (truncated or damaged)") from error
        parts = metadata.get("split.count", 0)
        if not isinstance(parts, int):
            raise broken(path, "split.count as an integer", f"{parts!r:.40}")
        if parts > 1:
            raise _split(path)
        if not isinstance(metadata.get("general.architecture"), str):
            raise broken(path, "general.architecture in its metadata", "none")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise broken(path, "general.alignment as a positive number", f"{alignment!r:.40}")
        start = -(-cursor.position // alignment) * alignment
        return GgufHeader(path=path, metadata=metadata, tensors=_tensors(path, table, start, len(data)))


def broken(path: Path, expected: str, found: str, fix: str = _FIX) -> BrokenCheckpoint:
    """Make the error of a damaged file."""
    return BrokenCheckpoint(path, expected=expected, found=found, fix=fix)


class _Cursor:
    """Reads one value after the other; a value behind the end of the file raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = len(_MAGIC)

    def scalars(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self._data, self.position)
        self.position += struct.calcsize(f"<{kinds}")
        return values

    def string(self) -> str:
        [length] = self.scalars("Q")
        end = self.position + length
        if end > len(self._data):
            raise struct.error
        text = self._data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self) -> Any:
        [kind] = self.scalars("I")
        return self._of_kind(kind)

    def _of_kind(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        element, count = self.scalars("IQ")
        if element in _SCALARS:
            if count > len(self._data):
                raise struct.error
            return list(self.scalars(f"{count}{_SCALARS[element]}"))
        return [self._of_kind(element) for _ in range(count)]


def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read a tensor's name, shape, type and offset from the start of the data."""
    name = cursor.string()
    [dimensions] = cursor.scalars("I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{name:.60} of {dimensions} dimensions")
    # The file has the fastest dimension first.
    shape = tuple(reversed(cursor.scalars(f"{dimensions}Q")))
    kind, offset = cursor.scalars("IQ")
    return name, shape, kind, offset


def _tensors(
    path: Path, table: list[tuple[str, tuple[int, ...], int, int]], start: int, file_bytes: int
) -> dict[str, GgufTensor]:
    import gguf

    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in table:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise UnsupportedModel(
                path,
                expected="tensor types that the gguf package knows",
                found=f"type {number} of {name}",
                fix='Update it (pip install --upgrade "pat-serve[gguf]"), or take a file of another type.',
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if name in tensors:
            raise broken(path, f"the tensor {name} once", "it twice")
        if not shape or shape[-1] % block:
            raise broken(path, f"rows of {name} in blocks of {block}", f"shape {shape}")
        size = prod(shape) // block * block_bytes
        begin = start + offset
        if begin + size > file_bytes:
            raise broken(
                path, f"{begin + size} bytes or more, by its table", f"{file_bytes} bytes (truncated or damaged)"
            )
        tensors[name] = GgufTensor(name=name, kind=kind.name, shape=shape, offset_bytes=begin, size_bytes=size)
    return tensors


def _split(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        path,
        expected="a GGUF file with the whole model in it",
        found="one part of several",
        fix="Join the parts with llama.cpp's tool: llama-gguf-split --merge FIRST_PART OUT.",
    )
