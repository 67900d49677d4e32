"""Check that a config.json can be used: sizes, names, rope settings, and no setting that two runtimes read apart.

`pat_serve.checkpoints.stock_class` builds the stock class and checks what only the class can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pat_serve.checkpoints.shards import broken
from pat_serve.errors import BrokenCheckpoint, UnsupportedModel
from pat_serve.families.family import Family

CONFIG = "config.json"
CORRECT = "Correct the file, or download it again."
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_SIZES_WITH_DEFAULTS = ("head_dim", "num_key_value_heads", "max_position_embeddings")
_DTYPES = ("float64", "float32", "float16", "bfloat16")
# Settings that vLLM's class reads and transformers' does not, or the other way round, and the value with which both
# compute the same. Without the setting they do, too.
_OF_ONE_RUNTIME: dict[str, Any] = {
    "ada_rms_norm_t_cond": False,
    "bias": False,
    "is_causal": True,
    "llama_4_scaling": None,
    "logit_scale": 1.0,
    "qk_norm": False,
    "qkv_bias": False,
    "text_config": None,
    "transformers_weights": None,
}


def check_config(config: Mapping[str, Any], family: Family, folder: Path) -> None:
    """Check that every setting that training, export and serving read is there and possible.

    Args:
        config: the parsed config.json.
        family: of its model_type.
        folder: of the file.

    Raises:
        BrokenCheckpoint: a setting is missing or impossible.
        UnsupportedModel: a setting makes one runtime load or compute something else than the other.
    """
    path = folder / CONFIG
    for name in _SIZES:
        if not _is_size(config.get(name)):
            raise bad_config(path, f"{name} as a positive integer", config.get(name))
    for name in _SIZES_WITH_DEFAULTS:
        if config.get(name) is not None and not _is_size(config[name]):
            raise bad_config(path, f"{name} as a positive integer", config[name])
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", family.defaults.get("num_key_value_heads")) or heads
    if heads % kv_heads:
        raise bad_config(path, f"num_attention_heads as a multiple of num_key_value_heads {kv_heads}", heads)
    eps = config.get("rms_norm_eps")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1e30:
        raise bad_config(path, "rms_norm_eps as a number that is not negative", eps)
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        raise bad_config(path, "tie_word_embeddings as true or false", config["tie_word_embeddings"])
    padding = config.get("pad_token_id")
    if type(padding) is int and padding >= config["vocab_size"]:
        raise bad_config(path, f"pad_token_id below vocab_size {config['vocab_size']}", padding)
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None and config[name] not in _DTYPES:
            raise bad_config(path, f"{name} as one of {', '.join(_DTYPES)}", config[name])
    _check_runtimes_agree(config, family, path)


def bad_config(path: Path, expected: str, found: object) -> BrokenCheckpoint:
    """Make the error of a setting; it shows the value as it stands, cut to a readable length."""
    return broken(path, expected, f"{found!r:.80}", fix=CORRECT)


def _check_runtimes_agree(config: Mapping[str, Any], family: Family, path: Path) -> None:
    for name, neutral in _OF_ONE_RUNTIME.items():
        if config.get(name) not in (None, neutral):
            raise UnsupportedModel(
                path,
                expected=f"settings that transformers and vLLM read alike in a {family.model_type} model",
                found=f"{name} = {str(config[name])[:60]}, which only one of them reads",
                fix=f"Delete {name}, if the model was trained without it.",
            )
    named = config.get("architectures")
    if named and named != [family.architecture]:
        # vLLM takes this class, and transformers takes the class of model_type.
        raise UnsupportedModel(
            path,
            expected=f'architectures ["{family.architecture}"], the class of model_type {family.model_type}',
            found=f"{named!r:.120}",
            fix="Correct whichever of both is wrong.",
        )
    layers = config.get("layer_types")
    if family.model_type == "llama" and isinstance(layers, list) and set(map(str, layers)) - {"full_attention"}:
        raise UnsupportedModel(
            path,
            expected="layer_types of full_attention in a llama model",
            found=f"{sorted(set(map(str, layers)))!r:.120}, which vLLM's class reads and transformers' does not",
            fix="Choose a model whose layers all attend to everything.",
        )


def _is_size(value: object) -> bool:
    """Tell whether a value is a size. True is an int to Python, and numbers beyond 2^31 are no sizes here."""
    return type(value) is int and 0 < value < 2**31
