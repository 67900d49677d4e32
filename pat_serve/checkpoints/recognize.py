"""Find the family of a checkpoint, or the unusual parts of a checkpoint that belongs to none.

The reasons come from config.json and from the names of the tensors. So a refusal names the obstacle to an exact export,
and does not only say that a name is not in a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pat_serve.errors import UnknownTensor, UnsupportedModel
from pat_serve.families.architectures import FAMILIES, LLAMA
from pat_serve.families.family import Family

_WRAPPERS = ("text_config", "vision_config", "audio_config", "thinker_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layernorm_epsilon")
_PARALLEL = ("use_parallel_residual", "parallel_attn", "parallel_block")
_NORM_BIAS = re.compile(r".*(norm|\bln_?\w*)\.bias")
_POST_NORM = re.compile(r".*\.(post_(feedforward|self_attn|attn|mlp|ffn)\w*norm)\.weight")
_LAYER_NORM = re.compile(r".*\.(\w*layernorm|ln_?\w*|norm\w*)\.weight")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def family_of(config: Mapping[str, Any], source: object, tensor_names: Iterable[str] = ()) -> Family:
    """Find the family that a config.json describes.

    Args:
        config: the parsed config.json.
        source: the model's folder or hub id, for the message.
        tensor_names: names of the weights, where they can be read; they show what is unusual in a model.

    Raises:
        UnsupportedModel: no family of the table has this model_type, or the config asks for more than it has.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        reasons = unusual_parts(config, list(tensor_names))
        raise UnsupportedModel(
            source,
            expected=f"model_type {', '.join(sorted(FAMILIES))} (Llama and Yi are llama)",
            found=f"model_type {model_type!r}" + (f" with {'; '.join(reasons)}" if reasons else ""),
            fix="Choose a model of a covered family; pat_serve/families/architectures.py lists them.",
        )
    if config.get("quantization_config"):
        raise UnsupportedModel(
            source,
            expected="unquantized weights",
            found="a quantization_config in config.json",
            fix="Use the unquantized checkpoint that it was made from.",
        )
    for setting, reason in family.refused.items():
        if _setting(config, setting):
            raise UnsupportedModel(
                source,
                expected=f"a {model_type} model without {setting}",
                found=f"{setting} = {str(_setting(config, setting))[:60]}",
                fix=f"Choose another variant of the model: {reason}.",
            )
    return family


def unusual_parts(config: Mapping[str, Any], tensor_names: list[str]) -> list[str]:
    """Name the parts that an exact export does not cover; empty when nothing is known to be unusual."""
    parts = []
    if wrappers := [name for name in _WRAPPERS if isinstance(config.get(name), dict)]:
        parts.append(f"a multimodal wrapper ({', '.join(wrappers)})")
    if experts := [name for name in _EXPERTS if config.get(name)] or _first(tensor_names, r".*\bexperts\b.*"):
        parts.append(f"a mixture of experts ({experts[0]})")
    biased = [name for name in tensor_names if _NORM_BIAS.fullmatch(name)]
    if layer_norm := [_template(name) for name in biased] or [name for name in _LAYER_NORM_EPS if name in config]:
        parts.append(f"LayerNorms, which subtract a mean over all channels ({layer_norm[0]})")
    if parallel := [name for name in _PARALLEL if config.get(name)] or _only_norm(tensor_names):
        parts.append(f"a parallel block, whose attention and MLP read the same stream ({parallel[0]})")
    if post := [found[1] for name in tensor_names if (found := _POST_NORM.fullmatch(name))]:
        parts.append(f"post-norms between a writer and the residual add ({post[0]})")
    if unknown := _unknown_kinds(tensor_names):
        more = f" and {len(unknown) - 1} other kinds" if len(unknown) > 1 else ""
        parts.append(f"tensors that no table holds ({unknown[0]}{more})")
    return parts


def _setting(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _template(name: str) -> str:
    return _LAYER_NUMBER.sub("{i}", name)


def _first(names: list[str], pattern: str) -> list[str]:
    return [_template(name) for name in names if re.fullmatch(pattern, name)][:1]


def _only_norm(names: list[str]) -> list[str]:
    """Find the norm of a layer that has a single one, besides the norms of its heads."""
    layer = [name for name in names if re.search(r"\.0\.", name)]
    norms = [name for name in layer if _LAYER_NORM.fullmatch(name) and not re.search(r"\.[qk]_(layer)?norm\.", name)]
    has_both = any("attn" in name or "attention" in name for name in layer) and any("mlp" in name for name in layer)
    return [_template(norms[0])] if has_both and len(norms) == 1 else []


def _unknown_kinds(names: list[str]) -> list[str]:
    kinds: dict[str, None] = {}
    for name in names:
        try:
            LLAMA.match(name)
        except UnknownTensor:
            if not LLAMA.ignores(name):
                kinds[_template(name)] = None
    return list(kinds)
