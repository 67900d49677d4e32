"""Model families as data: for every tensor of a checkpoint, which named axis each of its dimensions runs along.

An export cuts a tensor along the axes that a plan cuts, and nothing else; a tensor that no line of the table matches is
an error, never copied blindly. A NEW FAMILY is one `Family` in `FAMILIES`.

Axis names: `hidden` is the residual stream; `vocab`, `heads.{i}` (query heads x head_dim), `kv_heads.{i}` and `ffn.{i}`
are written out so that other methods can cut them. `qkv.{i}` and `gate_up.{i}` are fused ones, `head` is one head's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pat_serve.errors import UnknownTensor

HIDDEN = "hidden"
# The same in every family of the table.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One kind of tensor in a checkpoint.

    Attributes:
        module: dotted module name, with `{i}` for the layer's number.
        axes: names of the weight's dimensions in order; a linear's are (out, in), an embedding's (vocab, hidden).
        writes_residual: the module's output is added to (or starts) the residual stream, so an HSM sits on it.
        hidden_norm: the tensor is the gain of an RMSNorm over the hidden dimension.
        norm: for a linear that reads the residual stream, the module (with `{i}`) of the hidden RMSNorm that feeds it.
        head_norm: an RMSNorm over each head follows, with the config's one rms_norm_eps.
        lora: a linear that fine-tuning adapts by default.
        bias: the module may carry a bias; it runs along the weight's first axis.
    """

    module: str
    axes: tuple[str, ...]
    writes_residual: bool = False
    hidden_norm: bool = False
    norm: str | None = None
    head_norm: bool = False
    lora: bool = False
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportAs:
    """Another stock class that computes the same and, unlike the family's own, honours an explicit head_dim everywhere.

    Attributes:
        model_type: of the other class.
        architecture: of the other class.
        settings: what its config needs to compute the same.
        dropped: settings of the base's config that it does not know.
        zero_biases: modules (with `{i}`) that carry a bias there and none here.
    """

    model_type: str
    architecture: str
    settings: Mapping[str, Any]
    dropped: tuple[str, ...]
    zero_biases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its tensors and the rules of its config class.

    Attributes:
        model_type: as config.json names it.
        architecture: the stock class that an export names.
        tensors: every tensor of a checkpoint.
        ignored: patterns of buffers that older conversions saved and that every loader recomputes.
        hidden_multiple_of_heads: the exported config class refuses hidden_size % num_attention_heads != 0, even when
            head_dim is given (transformers' LlamaConfig).
        norm_offset: an RMSNorm multiplies by norm_offset + its stored weight (Gemma: 1).
        scaled_embedding: the embedding's output is multiplied by sqrt(hidden_size) in the model's dtype (Gemma).
        defaults: what the config class fills in for settings that config.json leaves out and this package reads.
        refused: settings (dotted where nested) that a narrower model cannot keep, and why.
        export_as: the class of a narrower export, when it is not the base's own.
    """

    model_type: str
    architecture: str
    tensors: tuple[TensorSpec, ...]
    ignored: tuple[str, ...] = ()
    hidden_multiple_of_heads: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    export_as: ExportAs | None = None

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


_LAYER = "model.layers.{i}"
_INPUT_NORM = f"{_LAYER}.input_layernorm"
_POST_NORM = f"{_LAYER}.post_attention_layernorm"
_BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def _reader(name: str, axis: str, norm: str, *, bias: bool = False, head_norm: bool = False) -> TensorSpec:
    """A linear of a layer that reads the residual stream through a norm."""
    return TensorSpec(
        module=f"{_LAYER}.{name}", axes=(axis, HIDDEN), norm=norm, lora=True, bias=bias, head_norm=head_norm
    )


def _writer(name: str, axis: str, *, bias: bool = False) -> TensorSpec:
    """A linear of a layer whose output is added to the residual stream."""
    return TensorSpec(module=f"{_LAYER}.{name}", axes=(HIDDEN, axis), writes_residual=True, lora=True, bias=bias)


def _decoder(
    *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False, head_norms: bool = False
) -> tuple[TensorSpec, ...]:
    """The tensors of a pre-norm decoder: what Llama, Mistral, Qwen and Gemma share."""
    head_norm_specs = [
        TensorSpec(module=f"{_LAYER}.self_attn.{name}", axes=("head",)) for name in ("q_norm", "k_norm") if head_norms
    ]
    return _around(
        _reader("self_attn.q_proj", "heads.{i}", _INPUT_NORM, bias=qkv_bias, head_norm=head_norms),
        _reader("self_attn.k_proj", "kv_heads.{i}", _INPUT_NORM, bias=qkv_bias, head_norm=head_norms),
        _reader("self_attn.v_proj", "kv_heads.{i}", _INPUT_NORM, bias=qkv_bias),
        *head_norm_specs,
        _writer("self_attn.o_proj", "heads.{i}", bias=o_bias),
        _reader("mlp.gate_proj", "ffn.{i}", _POST_NORM, bias=mlp_bias),
        _reader("mlp.up_proj", "ffn.{i}", _POST_NORM, bias=mlp_bias),
        _writer("mlp.down_proj", "ffn.{i}", bias=mlp_bias),
    )


def _around(*linears: TensorSpec) -> tuple[TensorSpec, ...]:
    """A layer's linears with the embedding, the norms and the head."""
    return (
        TensorSpec(module=EMBEDDING, axes=("vocab", HIDDEN), writes_residual=True),
        *(TensorSpec(module=norm, axes=(HIDDEN,), hidden_norm=True) for norm in (_INPUT_NORM, _POST_NORM, FINAL_NORM)),
        *linears,
        TensorSpec(module=HEAD, axes=("vocab", HIDDEN), norm=FINAL_NORM),
    )


# Llama 1, 2 and 3.x, and all that call themselves llama: Yi, SmolLM, TinyLlama, Vicuna.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_multiple_of_heads=True,
    ignored=_BUFFERS,
    tensors=_decoder(qkv_bias=True, o_bias=True, mlp_bias=True),
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    ignored=_BUFFERS,
    defaults={"num_key_value_heads": 8},
    tensors=_decoder(),
)

# vLLM's Qwen2 computes hidden_size // num_attention_heads and looks at no head_dim. A Llama with attention_bias is the
# same function (its o_proj wants a bias too: zeros), and both transformers and vLLM honour its head_dim.
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    hidden_multiple_of_heads=True,
    ignored=_BUFFERS,
    defaults={"num_key_value_heads": 32},
    refused={
        "use_sliding_window": "it is exported as a Llama, which has no sliding window",
        "dual_chunk_attention_config": "it is exported as a Llama, which has no chunked attention",
    },
    export_as=ExportAs(
        model_type="llama",
        architecture="LlamaForCausalLM",
        settings={"attention_bias": True, "mlp_bias": False},
        dropped=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "use_mrope"),
        zero_biases=(f"{_LAYER}.self_attn.o_proj",),
    ),
    tensors=_decoder(qkv_bias=True),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    ignored=_BUFFERS,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    tensors=_decoder(head_norms=True),
)

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    ignored=_BUFFERS,
    norm_offset=1.0,
    scaled_embedding=True,
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    tensors=_decoder(),
)

_LONG_ROPE = "Phi3Config checks the length of its rope factors against hidden_size // num_attention_heads"

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    ignored=_BUFFERS,
    refused={"rope_scaling": _LONG_ROPE, "rope_parameters.short_factor": _LONG_ROPE},
    tensors=_around(
        _reader("self_attn.qkv_proj", "qkv.{i}", _INPUT_NORM),
        _writer("self_attn.o_proj", "heads.{i}"),
        _reader("mlp.gate_up_proj", "gate_up.{i}", _POST_NORM),
        _writer("mlp.down_proj", "ffn.{i}"),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, PHI3)}
