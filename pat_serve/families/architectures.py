"""Model families as data: for every tensor of a checkpoint, which axis each of its dimensions runs along.

An export cuts a tensor along the axes that a plan cuts, and nothing else; a tensor that no line of the table matches is
an error, never copied blindly. A NEW FAMILY is one `Family` in `FAMILIES`.
"""

from __future__ import annotations

from pat_serve.cut.axes import FFN_DIM, GATE_UP_DIM, HEAD_DIM, HIDDEN_DIM, KV_DIM, Q_DIM, QKV_DIM, VOCAB_DIM, Dim
from pat_serve.families.family import ExportAs, Family, TensorSpec

# The same in every family of the table.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"


_LAYER = "model.layers.{i}"
_INPUT_NORM = f"{_LAYER}.input_layernorm"
_POST_NORM = f"{_LAYER}.post_attention_layernorm"
_BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def _reader(name: str, dim: Dim, norm: str, *, bias: bool = False, head_norm: bool = False) -> TensorSpec:
    """A linear of a layer that reads the residual stream through a norm."""
    return TensorSpec(
        module=f"{_LAYER}.{name}", dims=(dim, HIDDEN_DIM), norm=norm, lora=True, bias=bias, head_norm=head_norm
    )


def _writer(name: str, dim: Dim, *, bias: bool = False) -> TensorSpec:
    """A linear of a layer whose output is added to the residual stream."""
    return TensorSpec(module=f"{_LAYER}.{name}", dims=(HIDDEN_DIM, dim), writes_residual=True, lora=True, bias=bias)


def _decoder(
    *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False, head_norms: bool = False
) -> tuple[TensorSpec, ...]:
    """The tensors of a pre-norm decoder: what Llama, Mistral, Qwen and Gemma share."""
    head_norm_specs = [
        TensorSpec(module=f"{_LAYER}.self_attn.{name}", dims=(HEAD_DIM,)) for name in ("q_norm", "k_norm") if head_norms
    ]
    return _around(
        _reader("self_attn.q_proj", Q_DIM, _INPUT_NORM, bias=qkv_bias, head_norm=head_norms),
        _reader("self_attn.k_proj", KV_DIM, _INPUT_NORM, bias=qkv_bias, head_norm=head_norms),
        _reader("self_attn.v_proj", KV_DIM, _INPUT_NORM, bias=qkv_bias),
        *head_norm_specs,
        _writer("self_attn.o_proj", Q_DIM, bias=o_bias),
        _reader("mlp.gate_proj", FFN_DIM, _POST_NORM, bias=mlp_bias),
        _reader("mlp.up_proj", FFN_DIM, _POST_NORM, bias=mlp_bias),
        _writer("mlp.down_proj", FFN_DIM, bias=mlp_bias),
    )


def _around(*linears: TensorSpec) -> tuple[TensorSpec, ...]:
    """A layer's linears with the embedding, the norms and the head."""
    norms = (_INPUT_NORM, _POST_NORM, FINAL_NORM)
    return (
        TensorSpec(module=EMBEDDING, dims=(VOCAB_DIM, HIDDEN_DIM), writes_residual=True),
        *(TensorSpec(module=norm, dims=(HIDDEN_DIM,), hidden_norm=True) for norm in norms),
        *linears,
        TensorSpec(module=HEAD, dims=(VOCAB_DIM, HIDDEN_DIM), norm=FINAL_NORM),
    )


# Llama 1, 2 and 3.x, and all that call themselves llama: Yi, SmolLM, TinyLlama, Vicuna.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hidden_multiple_of_heads=True,
    ignored=_BUFFERS,
    # A Mistral without a sliding window is the same function, and MistralConfig does not look at hidden_size % heads.
    uneven=ExportAs(
        model_type="mistral",
        architecture="MistralForCausalLM",
        settings={"sliding_window": None},
        dropped=("attention_bias", "mlp_bias", "pretraining_tp", "layer_types"),
        filled={"max_position_embeddings": 2048},
        without=("attention_bias", "mlp_bias"),
    ),
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
        hidden_multiple_of_heads=True,
        filled={"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
    ),
    tensors=_decoder(qkv_bias=True),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    ignored=_BUFFERS,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
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
        _reader("self_attn.qkv_proj", QKV_DIM, _INPUT_NORM),
        _writer("self_attn.o_proj", Q_DIM),
        _reader("mlp.gate_up_proj", GATE_UP_DIM, _POST_NORM),
        _writer("mlp.down_proj", FFN_DIM),
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, PHI3)}
