"""A model's sizes as the records of pat-bench hold them, under the names that these records have had from the start."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer
from typing_extensions import TypedDict

from pat_serve.shapes.sizes import ModelSizes

_NAMES = {
    "hidden_size": "hidden",
    "num_layers": "layers",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "ffn_size": "ffn",
    "vocab_size": "vocab",
    "tied_head": "tied",
    "linear_bytes": "linear_bytes",
}


class SizesRecord(TypedDict):
    """The record's form; `ModelSizes` says what each entry means."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_head: bool
    linear_bytes: float | None


def _read(value: Any) -> Any:
    return {_NAMES.get(name, name): entry for name, entry in value.items()} if isinstance(value, dict) else value


def _written(sizes: ModelSizes) -> dict[str, Any]:
    return {name: getattr(sizes, ours) for name, ours in _NAMES.items()}


RecordedSizes = Annotated[ModelSizes, BeforeValidator(_read), PlainSerializer(_written, return_type=SizesRecord)]
