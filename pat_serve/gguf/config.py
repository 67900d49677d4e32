"""Make the config.json of the stock class that computes the model of a GGUF file's metadata.

Every setting that changes the function is either read here or refused: an overlooked setting would give another model
under the same name. transformers' own reading (5.19) passes over biases of a Llama, the factors of Llama 3's rope
and scaled ropes in silence (`LOG.md`, 2026-11-29).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pat_serve.errors import UnsupportedModel
from pat_serve.families.architectures import FAMILIES
from pat_serve.families.family import Family
from pat_serve.gguf.header import GgufHeader, broken

ROPE_FREQUENCIES = "rope_freqs.weight"
# The settings have the names of this version of transformers.
_LAYOUT = "5.0.0"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# These are llama.cpp's names of the table's families. A Mistral is a llama there, without its sliding window.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "phi3": "phi3"}
# These parts change the function, and no family of the table has them.
_UNUSUAL = (
    "expert_count",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.scaling.yarn_log_multiplier",
)
# Llama 3.1 and 3.2 (and the models made from them) differ in the factor alone.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The metadata of the architecture, and errors for values that are not covered."""

    header: GgufHeader

    def get(self, name: str) -> Any:
        return self.header.metadata.get(f"{self.header.architecture}.{name}")

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, list) and len(set(value)) == 1:
            # The file has one value a layer, and all are alike.
            value = value[0]
        if isinstance(value, list):
            raise self.unsupported(f"one {name} for all layers", "a different one for some")
        if type(value) is not int or not 0 < value < 2**31:
            raise broken(self.header.path, f"{self.header.architecture}.{name} as a positive integer", f"{value!r:.40}")
        return value

    def number(self, name: str, default: float | None = None, *, may_be_zero: bool = True) -> float:
        value = self.get(name)
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
        if not is_number or (value == 0 and not may_be_zero):
            expected = f"{self.header.architecture}.{name} as a {'' if may_be_zero else 'positive '}number"
            raise broken(self.header.path, expected, f"{value!r:.40}")
        # 1e-5 is stored as the float32 next to it, 9.999999747378752e-06. The shortest decimal for it is the original.
        return float(str(np.float32(value)))

    def unsupported(self, expected: str, found: str) -> UnsupportedModel:
        return UnsupportedModel(
            self.header.path,
            expected=expected,
            found=found,
            fix="Choose another model; docs/formats.md says what is read from GGUF.",
        )


def family_of_header(header: GgufHeader) -> Family:
    """Find the family of the table for the file's architecture.

    Raises:
        UnsupportedModel: the table has no such family.
    """
    name = _FAMILIES.get(header.architecture)
    if name is None:
        raise UnsupportedModel(
            header.path,
            expected=f"a GGUF file of the architecture {', '.join(sorted(_FAMILIES))} (Yi and Mistral are llama)",
            found=header.architecture,
            fix="Choose a model of a covered family; pat_serve/families/architectures.py lists them.",
        )
    return FAMILIES[name]


def config_of(header: GgufHeader, frequencies: Callable[[], np.ndarray]) -> dict[str, Any]:
    """Make config.json without its dtype.

    Args:
        header: header of the file.
        frequencies: reads the tensor of Llama 3's rope factors, where the file has one.

    Raises:
        UnsupportedModel: the architecture or a setting is not covered.
        BrokenCheckpoint: a size is missing or impossible.
    """
    family, settings = family_of_header(header), _Settings(header=header)
    _refuse_unusual(settings)
    heads, width = settings.size("attention.head_count"), settings.size("embedding_length")
    rotated = settings.get("rope.dimension_count")
    head_dim = settings.size("attention.key_length", rotated or width // heads)
    if settings.size("attention.value_length", head_dim) != head_dim:
        raise settings.unsupported(
            "keys and values of one size", f"{head_dim} and {settings.get('attention.value_length')}"
        )
    if rotated not in (None, head_dim):
        raise settings.unsupported(f"a rope over all {head_dim} dimensions of a head", f"one over {rotated}")
    if _EMBEDDING not in header.tensors:
        raise broken(header.path, f"the tensor {_EMBEDDING}", "no such tensor")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": width,
        "intermediate_size": settings.size("feed_forward_length"),
        "num_hidden_layers": settings.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": settings.size("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10000.0, may_be_zero=False),
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": _HEAD not in header.tensors,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        # Without a version transformers takes the tokenizer for an old Mistral's and warns.
        "transformers_version": _LAYOUT,
    }
    if rope := _rope_scaling(settings, config, frequencies):
        config["rope_scaling"] = rope
    config |= _of_family(settings, family, config)
    return config | _token_ids(header)


def generation_config_of(header: GgufHeader) -> dict[str, Any]:
    """Make generation_config.json: the tokens that begin a text and those that end an answer."""
    ids = _token_ids(header)
    # A chat model ends its turns with a token of its own. llama.cpp stops there as well.
    ends = [ids.get("eos_token_id"), _token_id(header, "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _of_family(settings: _Settings, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the settings of the family's class beyond the sizes."""
    window = settings.get("attention.sliding_window") or None
    if window is not None and family.model_type != "phi3":
        raise settings.unsupported(f"a {family.model_type} model without a sliding window", f"one of {window} tokens")
    tensors = settings.header.tensors
    if family.model_type == "llama":
        return {
            "attention_bias": any(f"blk.0.attn_{part}.bias" in tensors for part in ("q", "k", "v", "output")),
            "mlp_bias": any(f"blk.0.ffn_{part}.bias" in tensors for part in ("gate", "up", "down")),
        }
    if family.model_type == "qwen2":
        return {"use_sliding_window": False}
    if family.model_type == "qwen3":
        return {"attention_bias": False, "use_sliding_window": False}
    if family.model_type == "phi3":
        return {"sliding_window": window, "original_max_position_embeddings": config["max_position_embeddings"]}
    # Every Gemma was trained with this activation, whatever its config.json calls it.
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def _refuse_unusual(settings: _Settings) -> None:
    for name in _UNUSUAL:
        value = settings.get(name)
        if value:
            raise settings.unsupported(f"a {settings.header.architecture} model without {name}", f"{name} {value}")
    if (causal := settings.get("attention.causal")) not in (None, True):
        raise settings.unsupported("a model whose tokens see the ones before them alone", f"attention.causal {causal}")
    for tensor in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if tensor in settings.header.tensors:
            raise settings.unsupported("a rope without factors for long contexts", f"the tensor {tensor}")


def _rope_scaling(
    settings: _Settings, config: Mapping[str, Any], frequencies: Callable[[], np.ndarray]
) -> dict[str, Any] | None:
    kind, factor = settings.get("rope.scaling.type"), settings.get("rope.scaling.factor")
    factor = settings.get("rope.scale_linear") if factor is None else factor
    if ROPE_FREQUENCIES in settings.header.tensors:
        return _llama3_rope(settings, config, frequencies())
    if kind in (None, "none") and factor in (None, 0.0, 1.0):
        return None
    if kind in (None, "linear") and isinstance(factor, int | float) and factor > 0:
        return {"rope_type": "linear", "factor": float(factor)}
    raise settings.unsupported("an unscaled or a linearly scaled rope, or Llama 3's", f"{kind} by {factor}")


def _llama3_rope(settings: _Settings, config: Mapping[str, Any], found: np.ndarray) -> dict[str, Any]:
    """Find the settings behind the tensor of frequency factors, and check them by making the tensor again.

    llama.cpp stores the divisor of the frequency for each pair of a head's dimensions: 1 for short wavelengths, the
    factor for long ones, and a blend between (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors).
    """
    factor = float(np.max(found))
    half = int(config["head_dim"]) // 2
    wavelengths = 2 * np.pi * float(config["rope_theta"]) ** (np.arange(half, dtype=np.float64) / half)
    smooth = (_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    blended = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(
        wavelengths < _LLAMA3_CONTEXT / _LLAMA3_HIGH,
        1.0,
        np.where(wavelengths > _LLAMA3_CONTEXT / _LLAMA3_LOW, factor, blended),
    )
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise settings.unsupported("the rope factors of Llama 3.1 or 3.2", f"others in {ROPE_FREQUENCIES}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _token_ids(header: GgufHeader) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {setting: _token_id(header, name) for setting, name in names.items()}
    return {setting: value for setting, value in found.items() if value is not None}


def _token_id(header: GgufHeader, name: str) -> int | None:
    value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int and 0 <= value < header.tensors[_EMBEDDING].shape[0] else None
