"""The sizes of an export beside its base's, as pat_export.json has them."""

from __future__ import annotations

from typing import Any

from pat_serve.shapes.sizes import ModelSizes

# By the names that config.json has for them, in the order in which the card tells them.
_SETTINGS = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
_TOLD = {
    "hidden_size": "hidden size {}",
    "num_hidden_layers": "{} layers",
    "intermediate_size": "FFN {}",
    "num_attention_heads": "{} heads",
    "num_key_value_heads": "{} key-value heads",
}


def recorded_shape(base: ModelSizes, exported: ModelSizes) -> dict[str, dict[str, int]]:
    """Every size of both, by config.json's name."""
    return {
        setting: {"base": getattr(base, name), "exported": getattr(exported, name)}
        for setting, name in _SETTINGS.items()
    }


def changed_sizes(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The sizes that the export does not have from its base.

    Args:
        record: content of pat_export.json; version 1 knows the width alone.
    """
    shape = record["shape"] if "shape" in record else {"hidden_size": record["hidden_size"]}
    return {setting: sizes for setting, sizes in shape.items() if sizes["base"] != sizes["exported"]}


def told_shape(record: dict[str, Any]) -> str:
    """ "24 layers, FFN 1280"; the width of an export that has its base's sizes."""
    changed = changed_sizes(record) or {"hidden_size": record["hidden_size"]}
    return ", ".join(_TOLD[setting].format(sizes["exported"]) for setting, sizes in changed.items())
