"""A Hugging Face checkpoint on disk: found, checked against its family's table, and read one tensor at a time.

Everything is checked from the safetensors headers before a weight is read: a truncated shard, a tensor that is missing,
unknown or of the wrong shape is an error of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pat_serve.checkpoints.config_check import check_config
from pat_serve.checkpoints.locate import absolute, check_plain_folder, commit_of, locate, read_config
from pat_serve.checkpoints.recognize import family_of
from pat_serve.checkpoints.shards import DTYPES, TensorEntry, broken, read_tensors
from pat_serve.checkpoints.stock_class import check_stock_tensors, stock_shapes
from pat_serve.errors import ModelError
from pat_serve.families.architectures import EMBEDDING, FAMILIES
from pat_serve.families.family import Family
from pat_serve.gguf.folder import sha256_of_folder
from pat_serve.run.plan import BaseReference, file_sha256
from pat_serve.shapes.sizes import ModelSizes

__all__ = ["DTYPES", "Checkpoint", "TensorEntry", "open_checkpoint", "read_tensor", "tensor_names"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        source: what the user called it: a folder, a GGUF file or a hub id.
        revision: the hub's commit, or the requested one where the folder does not tell it; None for a local folder.
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

    @cached_property
    def sizes(self) -> ModelSizes:
        """Sizes of the model, explicit or by the config class's rules."""
        return ModelSizes.of(self.config, self.family, self.folder)

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.sizes.hidden

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.sizes.layers

    @property
    def num_attention_heads(self) -> int:
        """The number of query heads in a layer."""
        return self.sizes.heads

    @property
    def head_dim(self) -> int:
        """Size of one attention head, explicit or by the config class's rule."""
        return self.sizes.head_dim

    @property
    def num_key_value_heads(self) -> int:
        """The number of key-value heads in a layer."""
        return self.sizes.kv_heads

    @property
    def tied(self) -> bool:
        """The output head is the embedding table."""
        return self.sizes.tied

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights (the embedding's, when they differ)."""
        return self.tensors[f"{EMBEDDING}.weight"].dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor, as it is stored."""
        return self.tensors[name].read()

    def shards(self) -> list[Path]:
        """The checkpoint's weight files, in order."""
        return sorted({entry.shard for entry in self.tensors.values()})

    def reference(self) -> BaseReference:
        """Identity of this checkpoint, with the SHA-256 of every file that decides what it computes."""
        files = [self.folder / "config.json", *self.shards()]
        return BaseReference(
            source=absolute(self.source),
            revision=self.revision,
            architecture=self.family.architecture,
            sha256={path.name: file_sha256(path) for path in files},
            gguf_sha256=sha256_of_folder(self.folder),
        )


def tensor_names(shard: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def read_tensor(shard: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, as it is stored."""
    with safe_open(shard, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check all that its headers tell.

    Raises:
        MissingModel: the model is not there.
        UnsupportedModel: its family is not in the table.
        BrokenCheckpoint: a shard is missing, truncated or damaged, or a tensor is missing or of another shape.
        UnknownTensor: the checkpoint holds a tensor that its family does not have.
    """
    if not Path(source).exists():
        # A model that is refused by its config alone need not be downloaded.
        family_of(read_config(locate(source, revision, weights=False)), source)
    folder = locate(source, revision)
    check_plain_folder(folder)
    config = read_config(folder)
    family = family_of(config, source, [] if str(config.get("model_type")) in FAMILIES else _names(folder, source))
    check_config(config, family, folder)
    tensors = read_tensors(folder, source, family.ignores)
    checkpoint = Checkpoint(
        source=source,
        revision=commit_of(folder) or revision,
        folder=folder,
        config=config,
        family=family,
        tensors=tensors,
    )
    wanted = stock_shapes(config, tensors, folder)
    _check_tensors(checkpoint)
    check_stock_tensors(wanted, config, family, tensors, folder)
    return checkpoint


def _names(folder: Path, source: str) -> list[str]:
    """List the names of all tensors, or none when the weights cannot be read."""
    try:
        return list(read_tensors(folder, source, lambda _: False))
    except ModelError:
        return []


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Check that every tensor is known and has the shape that the config gives it, and that none is missing."""
    for name, entry in checkpoint.tensors.items():
        spec, layer, kind = checkpoint.family.match(name)
        if layer is not None and layer >= checkpoint.num_layers:
            raise broken(entry.shard, f"{checkpoint.num_layers} layers, as config.json says", f"the tensor {name}")
        if name != f"{spec.module.format(i=layer)}.{kind}":
            raise broken(entry.shard, f"{spec.module.format(i=layer)}.{kind}", f"the tensor {name}")
        shape = spec.shape(kind, checkpoint.sizes)
        if entry.shape != shape:
            raise broken(entry.shard, f"{name} of shape {shape}, by config.json", str(entry.shape))
