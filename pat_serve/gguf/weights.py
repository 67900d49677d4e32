"""A GGUF file's tensors under their stock names, dequantised in runs of rows and written as safetensors.

Memory holds some rows in float32, whatever the size of the file and of its tensors.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pat_serve.checkpoints.shard_layout import encode_header, index_document, plan_shards, shard_names
from pat_serve.checkpoints.shards import INDEX
from pat_serve.errors import UnsupportedModel
from pat_serve.families.architectures import HEAD
from pat_serve.families.family import Family
from pat_serve.files.atomic import write_json
from pat_serve.gguf.config import ROPE_FREQUENCIES
from pat_serve.gguf.header import GgufHeader, GgufTensor, broken
from pat_serve.shapes.sizes import ModelSizes

_SHARD_BYTES = 5 * 10**9
_ROWS_BYTES = 2**24
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Some conversions precompute these tensors, and no loader reads them.
_IGNORED = (".attn_rot_embd.weight", ".attn_rot_embd", ".rope_freqs.weight")


@dataclass(frozen=True, kw_only=True)
class StockTensor:
    """A tensor of the folder.

    Attributes:
        name: its stock name.
        shape: its stock shape.
        source: tensor of the file; None for a bias of zeros that the stock class wants and the file leaves out.
        heads: of q and k of a llama, whose rows the file has in another order; None for all others.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor | None
    heads: int | None = None


def stored_dtype(header: GgufHeader) -> torch.dtype:
    """Choose the folder's dtype: the matrices' own where all have the same float type, else bfloat16.

    So a float file loses nothing. bfloat16's rounding (at most 0.2 % of a value) is small beside that of any
    quantised type.
    """
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return _FLOATS.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16


def stock_tensors(header: GgufHeader, family: Family, config: Mapping[str, Any]) -> list[StockTensor]:
    """List every tensor that the folder will hold, in the order of layers.

    Raises:
        UnsupportedModel: the file has a tensor that the family does not have.
        BrokenCheckpoint: a tensor is missing or of a type that the gguf package cannot read.
    """
    import gguf

    sizes = ModelSizes.of(config, family)
    # The gguf package makes every layer's names at once: a damaged count of millions would take minutes and gigabytes.
    if sizes.layers > len(header.tensors):
        raise broken(header.path, f"tensors of {sizes.layers} layers", f"{len(header.tensors)} tensors in all")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = gguf.get_tensor_name_map(architecture, sizes.layers)
    left = dict(header.tensors)
    left.pop(ROPE_FREQUENCIES, None)
    tensors = []
    for module, spec, _ in family.modules(sizes.layers):
        theirs = names.get_name(module)
        for part in ("weight", "bias"):
            source = left.pop(f"{theirs}.{part}", None)
            heads = _permuted_heads(family, module, sizes)
            if source is not None and (part == "weight" or spec.bias):
                tensors.append(StockTensor(name=f"{module}.{part}", shape=source.shape, source=source, heads=heads))
            elif source is not None:
                left[source.name] = source
            elif part == "weight" and not (module == HEAD and config["tie_word_embeddings"]):
                raise broken(header.path, f"the tensor {theirs}.weight", "no such tensor")
            elif part == "bias" and _wants_bias(module, config):
                rows = tensors[-1].shape[:1]
                tensors.append(StockTensor(name=f"{module}.bias", shape=rows, source=None))
    unknown = sorted(name for name in left if not name.endswith(_IGNORED))
    if unknown:
        raise UnsupportedModel(
            header.path,
            expected=f"the tensors of a {family.model_type} model",
            found=f"{unknown[0]}" + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""),
            fix="Choose another model; docs/formats.md says what is read from GGUF.",
        )
    return tensors


def read_rows(header: GgufHeader, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Read rows of a tensor and dequantise them to float32.

    Raises:
        UnsupportedModel: the gguf package cannot dequantise the type.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.kind]
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    row_bytes = tensor.size_bytes // max(rows, 1)
    stop = rows if stop is None else stop
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = tensor.offset_bytes + start * row_bytes
        raw = np.frombuffer(data[begin : begin + (stop - start) * row_bytes], dtype=np.uint8)
    if tensor.kind in ("F32", "F16"):
        values = raw.view(np.dtype("<f4") if tensor.kind == "F32" else np.dtype("<f2")).astype(np.float32)
    else:
        try:
            values = gguf.dequantize(raw.reshape(stop - start, row_bytes), kind)
        except NotImplementedError as error:
            raise UnsupportedModel(
                header.path,
                expected="tensor types that the gguf package can dequantise",
                found=f"{tensor.kind} in {tensor.name}",
                fix="Take the same model in another type: Q4_K_M, Q8_0 or F16.",
            ) from error
    return values.reshape(stop - start, *tensor.shape[1:]) if len(tensor.shape) > 1 else values.reshape(tensor.shape)


def write_weights(
    header: GgufHeader,
    family: Family,
    tensors: list[StockTensor],
    dtype: torch.dtype,
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """Write the safetensors of a folder, with an index where they are several.

    Args:
        header: of the file.
        family: of the model.
        tensors: as `stock_tensors` gives them.
        dtype: of all of them.
        folder: for the files.
        advance: called with the bytes of each tensor of the file once it is read.

    Raises:
        BrokenCheckpoint: values are not finite, in the file or in the dtype.
        UnsupportedModel: as `read_rows`.
    """
    shapes, by_name = {tensor.name: tensor.shape for tensor in tensors}, {tensor.name: tensor for tensor in tensors}
    shards = plan_shards(shapes, dtype, _SHARD_BYTES)
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        head, _ = encode_header({name: shapes[name] for name in names}, dtype)
        with (folder / file).open("wb") as output:
            output.write(head)
            for name in names:
                for block in _blocks(header, family, by_name[name], dtype):
                    output.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
                source = by_name[name].source
                advance(source.size_bytes if source is not None else 0)
    if len(shards) > 1:
        write_json(folder / INDEX, index_document(shards, shapes, dtype))


def _blocks(header: GgufHeader, family: Family, tensor: StockTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of a tensor in its stock layout, some at a time; a vector is one block."""
    if tensor.source is None:
        yield torch.zeros(tensor.shape, dtype=dtype)
        return
    rows, heads = (tensor.shape[0], tensor.heads) if len(tensor.shape) > 1 else (1, None)
    # Rows of a head change places among themselves, so at least a head is read at once.
    unit = rows // heads if heads else 1
    step = unit * max(1, _ROWS_BYTES // (4 * prod(tensor.shape[1:]) * unit))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = torch.from_numpy(read_rows(header, tensor.source, start, stop))
        if tensor.heads:
            block = unpermute_rotary(block, (stop - start) // unit if heads else tensor.heads)
        if family.norm_offset and len(tensor.shape) == 1:
            # llama.cpp stores the factor itself, which is 1 + w here.
            block = block - family.norm_offset
        block = block.to(dtype)
        if not bool(torch.isfinite(block).all()):
            raise broken(header.path, f"finite numbers in {tensor.source.name}", f"NaN or infinity in {dtype}")
        yield block


def unpermute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Reorder a llama's q or k, or its bias, from llama.cpp's rows (rotated pairs side by side) to the stock ones.

    Args:
        weight: (heads * head_dim, ...).
        heads: query or key-value heads.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _permuted_heads(family: Family, module: str, sizes: ModelSizes) -> int | None:
    if family.model_type != "llama" or not module.endswith(("q_proj", "k_proj")):
        return None
    return sizes.heads if module.endswith("q_proj") else sizes.kv_heads


def _wants_bias(module: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a linear needs a bias: the stock Llama has biases in all linears of a block or in none."""
    return bool(
        (".self_attn." in module and config.get("attention_bias") and not module.endswith("norm"))
        or (".mlp." in module and config.get("mlp_bias"))
    )
