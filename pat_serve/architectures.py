"""Model families as data: for every tensor of a checkpoint, which named axis each of its dimensions runs along.

An export cuts a tensor along the axes that a plan cuts, and nothing else; a tensor that no line of the table matches is
an error, never copied blindly. A NEW FAMILY is one `Family` in `FAMILIES`.

Axis names: `hidden` is the residual stream; `vocab`, `heads.{i}` (query heads x head_dim), `kv_heads.{i}` and `ffn.{i}`
are written out so that other methods can cut them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pat_serve.errors import UnknownTensor, UnsupportedModel

HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One kind of tensor in a checkpoint.

    Attributes:
        module: dotted module name, with `{i}` for the layer's number.
        axes: names of the weight's dimensions in order; a linear's are (out, in), an embedding's (vocab, hidden).
        writes_residual: the module's output is added to (or starts) the residual stream, so an HSM sits on it.
        hidden_norm: the tensor is the gain of an RMSNorm over the hidden dimension.
        norm: for a linear that reads the residual stream, the module (with `{i}`) of the hidden RMSNorm that feeds it.
        lora: a linear that fine-tuning adapts by default.
        bias: the module may carry a bias; it runs along the weight's first axis.
    """

    module: str
    axes: tuple[str, ...]
    writes_residual: bool = False
    hidden_norm: bool = False
    norm: str | None = None
    lora: bool = False
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its tensors and the rules of its config class.

    Attributes:
        model_type: as config.json names it.
        architecture: the stock class that an export names.
        tensors: every tensor of a checkpoint.
        ignored: patterns of buffers that older conversions saved and that every loader recomputes.
        hidden_multiple_of_heads: the config class refuses hidden_size % num_attention_heads != 0, even when head_dim is
            given (transformers' LlamaConfig).
        norm_offset: an RMSNorm multiplies by norm_offset + its stored weight (Gemma: 1).
        scaled_embedding: the embedding's output is multiplied by sqrt(hidden_size) (Gemma).
    """

    model_type: str
    architecture: str
    tensors: tuple[TensorSpec, ...]
    ignored: tuple[str, ...] = ()
    hidden_multiple_of_heads: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False

    def lora_targets(self) -> list[str]:
        """Names of the linears that LoRA adapts, as peft's `target_modules` wants them."""
        return sorted({spec.module.rsplit(".", 1)[-1] for spec in self.tensors if spec.lora})

    def residual_writers(self, num_layers: int) -> list[str]:
        """Dotted names of all modules whose output enters the residual stream: 2 * num_layers + 1 of them."""
        names: list[str] = []
        for spec in self.tensors:
            if spec.writes_residual:
                names += [spec.module.format(i=i) for i in range(num_layers)] if "{i}" in spec.module else [spec.module]
        return names

    def ignores(self, tensor_name: str) -> bool:
        """The tensor is a leftover that no loader reads."""
        return any(re.fullmatch(pattern, tensor_name) for pattern in self.ignored)

    def match(self, tensor_name: str) -> tuple[TensorSpec, int | None, str]:
        """Find a tensor's line in the table.

        Returns:
            its spec, the number of its layer (None outside the layers), and "weight" or "bias".

        Raises:
            UnknownTensor: the table has no line for it.
        """
        module, _, kind = tensor_name.rpartition(".")
        for spec in self.tensors:
            pattern = re.escape(spec.module).replace(r"\{i\}", r"(\d+)")
            found = re.fullmatch(pattern, module)
            if found and (kind == "weight" or (kind == "bias" and spec.bias)):
                return spec, int(found[1]) if found.groups() else None, kind
        raise UnknownTensor(
            tensor_name,
            expected=f"a tensor of the {self.model_type} family",
            found="a name that its table (pat_serve/architectures.py) does not hold",
            fix="Export a plain checkpoint of this family, or add the tensor to the table.",
        )

    def modules(self, num_layers: int) -> Iterator[tuple[str, TensorSpec, int | None]]:
        """Every module of a model with its line in the table and its layer's number (None outside the layers)."""
        for spec in self.tensors:
            layers: Iterable[int | None] = range(num_layers) if "{i}" in spec.module else [None]
            for i in layers:
                yield spec.module.format(i=i), spec, i

    def expected_tensors(self, num_layers: int, *, tied: bool) -> set[str]:
        """Names of all weights that a complete checkpoint holds (biases are optional)."""
        names = set()
        for spec in self.tensors:
            if tied and spec.module == "lm_head":
                continue
            layers: list[int | None] = list(range(num_layers)) if "{i}" in spec.module else [None]
            names |= {f"{spec.module.format(i=i)}.weight" for i in layers}
        return names


def _reader(module: str, axis: str, norm: str) -> TensorSpec:
    """A linear of a layer that reads the residual stream through a norm."""
    return TensorSpec(module=module, axes=(axis, HIDDEN), norm=norm, lora=True, bias=True)


def _writer(module: str, axis: str) -> TensorSpec:
    """A linear of a layer whose output is added to the residual stream."""
    return TensorSpec(module=module, axes=(HIDDEN, axis), writes_residual=True, lora=True, bias=True)


_LAYER = "model.layers.{i}"
_INPUT_NORM = f"{_LAYER}.input_layernorm"
_POST_NORM = f"{_LAYER}.post_attention_layernorm"
_FINAL_NORM = "model.norm"

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_multiple_of_heads=True,
    ignored=(r".*\.rotary_emb\.inv_freq",),
    tensors=(
        TensorSpec(module="model.embed_tokens", axes=("vocab", HIDDEN), writes_residual=True),
        TensorSpec(module=_INPUT_NORM, axes=(HIDDEN,), hidden_norm=True),
        _reader(f"{_LAYER}.self_attn.q_proj", "heads.{i}", _INPUT_NORM),
        _reader(f"{_LAYER}.self_attn.k_proj", "kv_heads.{i}", _INPUT_NORM),
        _reader(f"{_LAYER}.self_attn.v_proj", "kv_heads.{i}", _INPUT_NORM),
        _writer(f"{_LAYER}.self_attn.o_proj", "heads.{i}"),
        TensorSpec(module=_POST_NORM, axes=(HIDDEN,), hidden_norm=True),
        _reader(f"{_LAYER}.mlp.gate_proj", "ffn.{i}", _POST_NORM),
        _reader(f"{_LAYER}.mlp.up_proj", "ffn.{i}", _POST_NORM),
        _writer(f"{_LAYER}.mlp.down_proj", "ffn.{i}"),
        TensorSpec(module=_FINAL_NORM, axes=(HIDDEN,), hidden_norm=True),
        TensorSpec(module="lm_head", axes=("vocab", HIDDEN), norm=_FINAL_NORM),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}


def family_of(config: Mapping[str, Any], source: object) -> Family:
    """The family that a config.json describes.

    Args:
        config: the parsed config.json.
        source: the model's folder or hub id, for the message.

    Raises:
        UnsupportedModel: no family of the table has this model_type, or the config asks for something that it lacks.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModel(
            source,
            expected=f"model_type {' or '.join(sorted(FAMILIES))}",
            found=f"model_type {model_type!r}",
            fix="Choose a model of a covered family; pat_serve/architectures.py lists them.",
        )
    if config.get("quantization_config"):
        raise UnsupportedModel(
            source,
            expected="unquantized weights",
            found="a quantization_config in config.json",
            fix="Use the unquantized checkpoint that it was made from.",
        )
    return family
