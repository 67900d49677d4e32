"""The sources of a benchmark's model: a checkpoint, a GGUF file, a bare config.json, a hub id, or a shape of ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.checkpoints.shards import runtime_shards
from pat_serve.checkpoints.stock_class import check_stock_folder
from pat_serve.errors import MissingModel, UsageError
from pat_serve.files.atomic import write_json
from pat_serve.shapes.cpu_kernels import check_cpu_kernels
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import say

_SHAPES = files("pat_serve.server.bench") / "shapes"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that an engine can be started with.

    Attributes:
        name: as the user gave it.
        path: folder or hub id for vLLM.
        config: its config.json, cut to the wanted number of layers.
        shape: the sizes in it.
        on_disk: nothing needs to be fetched.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    shape: ModelSizes
    on_disk: bool


def shipped_shapes() -> list[str]:
    """Names of the shapes that this package holds."""
    return sorted(entry.name.removesuffix(".json") for entry in _SHAPES.iterdir() if entry.name.endswith(".json"))


def shipped_config(name: str) -> dict[str, Any] | None:
    """The config.json of a shipped shape; None where the name means something else, such as a folder."""
    if name not in shipped_shapes() or Path(name).exists():
        return None
    config: dict[str, Any] = json.loads((_SHAPES / f"{name}.json").read_text(encoding="utf-8"))
    return config


def resolve(name: str, *, flag: str, load_format: str, layers: int | None, scratch: Path) -> ModelSource:
    """Find a model, and cut it if wanted.

    A folder wins over a shipped shape of the same name, and a shipped shape over the hub.

    Args:
        name: folder, GGUF file, shipped shape, or hub id.
        flag: the flag that named the model, for messages.
        load_format: "auto" (real weights) or "dummy" (random weights).
        layers: number of decoder layers to keep; None keeps all. Random weights only.
        scratch: folder for a config.json of our own.

    Raises:
        MissingModel: no such folder, shape or hub id, no config.json in it, or no weights where they are needed.
        BrokenCheckpoint: an unreadable config.json, one without the sizes, or one of other weights than lie beside it.
        UsageError: layers with real weights, below 1, or more than the model has.
    """
    folder, local = Path(name), Path(name).exists()
    known = shipped_config(name)
    shipped = known is not None
    if known is not None:
        config, path, on_disk = known, "", True
    else:
        folder = _locate(name, flag)
        config = read_config(folder)
        path, on_disk = (str(folder.resolve()), True) if local else (name, False)
    ModelSizes.of(config, source=name)
    if load_format != "dummy" and (shipped or (on_disk and not any(any(folder.glob(kind)) for kind in _WEIGHTS))):
        raise MissingModel(
            f"{flag} {name}",
            expected="a checkpoint with weights",
            found="a shape that ships without weights" if shipped else "a folder without weight files",
            fix="Time it with random weights: add --load-format dummy.",
        )
    if layers is not None:
        config = cut_layers(config, layers, load_format=load_format, name=f"{flag} {name}")
    if load_format != "dummy" and on_disk and (shards := runtime_shards(folder.resolve())):
        check_stock_folder(folder, shards)
    if local:
        _tell_zeros(folder, name)
    if shipped or layers is not None:
        path, on_disk = str(scratch), True
        write_json(scratch / "config.json", config)
    return ModelSource(name=name, path=path, config=config, shape=ModelSizes.of(config, source=name), on_disk=on_disk)


def check_dtype(source: ModelSource, dtype: str) -> None:
    """Check that vLLM has kernels for the model in this dtype on this machine.

    Raises:
        UsageError: four-bit weights in float32 on a CPU.
        UnsupportedModel: heads of a size that vLLM has no CPU kernel for.
    """
    import torch

    if not torch.cuda.is_available():
        check_cpu_kernels(source.config, source.name, dtype)


def _tell_zeros(folder: Path, name: str) -> None:
    """Say of an export with zeros in its weights that they bring no speed, so that nobody measures it for that."""
    record = folder / "pat_export.json"
    try:
        sparsity = json.loads(record.read_text(encoding="utf-8")).get("sparsity")
        share = sparsity["zeros"] / sparsity["numbers"] if sparsity else 0
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return  # no export of ours, which is as good to measure
    if share:
        say(f"{name}: {share:.1%} of its linears' numbers are zero; vLLM computes with them all the same: no speed-up")


def cut_layers(config: Mapping[str, Any], layers: int, *, load_format: str, name: str) -> dict[str, Any]:
    """A copy of a config with fewer decoder layers.

    Every matrix that is left has its old size, lm_head too, so at a small batch and context the ratio of two equally
    cut models keeps its ceiling. At a large context the ceiling moves a little, since lm_head has no KV cache: with 32
    x 2048 tokens it is 1.075 for the whole Llama-2-7B and 1.091 with two layers.

    Raises:
        UsageError: real weights, or a number of layers that the model does not have.
    """
    if load_format != "dummy":
        raise UsageError(
            "--layers",
            expected="--load-format dummy beside it",
            found=f"--load-format {load_format}",
            fix="Only random weights can be cut: add --load-format dummy, or leave --layers out.",
        )
    full = ModelSizes.of(config, source=name).layers
    if not 1 <= layers <= full:
        raise UsageError(
            "--layers",
            expected=f"1 to {full}, the layers of {name}",
            found=str(layers),
            fix=f"Choose at most {full}, or leave --layers out.",
        )
    # Some configs also list a kind for each layer.
    kinds = {"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {}
    return {**config, "num_hidden_layers": layers, **kinds}


def config_sha256(config: Mapping[str, object]) -> str:
    """Digest of a config.json, keys sorted."""
    # A running engine's config may hold what JSON has no form for, such as a dtype.
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _locate(name: str, flag: str) -> Path:
    """Find the folder with a model's config.json; a missing one is told with the flag and the shipped shapes."""
    try:
        return locate(name, weights=False)
    except MissingModel as error:
        raise MissingModel(
            f"{flag} {error.subject}",
            expected=f"{error.expected}, or a shipped shape ({', '.join(shipped_shapes())})",
            found=error.found,
            fix=error.fix,
        ) from error
