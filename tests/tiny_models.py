"""Small seeded models and a tokenizer, made on the spot: no test downloads anything."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pat_serve.demo.tiny.base_model import train_tokenizer

SENTENCES = [str(value.__doc__) for value in (dict, str, list, int, float, set, bytes, argparse, Path)]


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s>, </s> and <pad>; every string can be encoded."""
    return train_tokenizer(SENTENCES, vocab_size)


def tiny_config(**overrides: Any) -> LlamaConfig:
    """2 layers, hidden 64, 4 query and 2 key-value heads of 32 (a head size that vLLM's CPU kernels know)."""
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | overrides))


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> LlamaForCausalLM:
    """A seeded random model whose norms' gains are not all one, so that an export that loses them fails."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.08)
    return model.to(dtype).eval()


def save_tiny_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a tiny model with its tokenizer and generation config, as a user's base model would lie on disk."""
    model = tiny_llama(seed, dtype, **overrides)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_family(
    folder: Path, model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A seeded random base of any model_type that transformers knows, with a tokenizer, as it would lie on disk.

    Gains of norms are around one (around zero where a norm stores w of 1 + w) and biases are not zero.
    """
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(settings | overrides))
    )
    centre = 0.0 if model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(centre - 0.5, centre + 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.08)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
