"""A model's sizes and what follows from them alone: parameters, KV cache, bytes of a decode step. Pure arithmetic.

`ModelSizes.of` is the one reader of the sizes in a config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pat_serve.cut.axes import FFN, HIDDEN, KV_GROUPS, LAYERS
from pat_serve.errors import BrokenCheckpoint
from pat_serve.families.architectures import FAMILIES
from pat_serve.families.family import Family


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a Llama-like decoder.

    Attributes:
        hidden: width of the residual stream.
        layers: number of decoder layers.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer, each with `heads_per_group` query heads.
        head_dim: of one head.
        ffn: channels of the feed-forward part of a layer.
        vocab: rows of the embedding.
        tied: the output head is the embedding.
        linear_bytes: bytes of a weight in the layers' matrices, where they are stored smaller than the rest (int8: 1,
            int4: 0.5; scales are not counted); None where all weights have one dtype.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    linear_bytes: float | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @staticmethod
    def of(config: Mapping[str, Any], family: Family | None = None, source: object = "the model") -> ModelSizes:
        """Read the sizes from a parsed config.json.

        Args:
            config: the parsed config.json of a Llama-like decoder.
            family: whose defaults fill in what config.json leaves out; by default the one that its model_type names.
            source: its path or name, for the message.

        Raises:
            BrokenCheckpoint: a size is missing or no positive integer.
        """
        family = family or FAMILIES.get(str(config.get("model_type")))
        defaults = {} if family is None else family.defaults

        def size(key: str, default: int | None = None) -> int:
            # A class's default fills in what is not there; where null is written, the size follows from others.
            value = config.get(key, defaults.get(key))
            if value is None:
                value = default
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BrokenCheckpoint(
                    f"{source}: config.json",
                    expected=f"{key} as a positive integer",
                    found="no such entry" if value is None else repr(value),
                    fix="Point at the config.json of a Llama-like decoder.",
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return ModelSizes(
            hidden=hidden,
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            ffn=size("intermediate_size"),
            vocab=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", defaults.get("tie_word_embeddings"))),
            linear_bytes=stored_bytes(config),
        )

    def with_counts(self, counts: Mapping[str, int]) -> ModelSizes:
        """The sizes of a model that keeps so many indices of each axis; heads keep their size.

        Args:
            counts: by axis (`hidden`, `layers`, `ffn`, `kv_groups`); an axis without a line is whole.
        """
        groups = counts.get(KV_GROUPS, self.kv_heads)
        return replace(
            self,
            hidden=counts.get(HIDDEN, self.hidden),
            layers=counts.get(LAYERS, self.layers),
            ffn=counts.get(FFN, self.ffn),
            kv_heads=groups,
            heads=groups * self.heads_per_group,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: q and o, k and v, and the three of the FFN."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def norm_weights(self) -> int:
        """Gains of the two norms of each layer and of the last one."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def head_weights(self) -> int:
        """Weights of lm_head, read and multiplied in full for each new token whether tied or not."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters: layers, norms, embedding table, and lm_head where it is not tied to the table.

        Biases and norms over heads are left out; `shapes.parameters` counts them too.
        """
        tables = self.head_weights * (1 if self.tied else 2)
        return self.layers * self.layer_weights + self.norm_weights + tables

    def layer_bytes(self, dtype_bytes: int) -> float:
        """Bytes of one layer's matrices, in a model that is otherwise served with so many bytes a weight."""
        return self.layer_weights * (self.linear_bytes or dtype_bytes)

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes of all parameters, likewise."""
        others = self.parameters - self.layers * self.layer_weights
        return round(self.layers * self.layer_bytes(dtype_bytes)) + others * dtype_bytes

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def stored_bytes(config: Mapping[str, Any]) -> float | None:
    """Bytes of a quantised weight, as compressed-tensors, GPTQ or AWQ tell it in a config.json; None without."""
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    bits = [(group.get("weights") or {}).get("num_bits") for group in groups.values()] or [quantization.get("bits")]
    return bits[0] / 8 if bits[0] in (2, 3, 4, 8, 16) else None


def decode_bytes(sizes: ModelSizes, *, batch_size: int, context_tokens: float, dtype_bytes: int) -> float:
    """Bytes that one decode step must read: all matrices, norms and lm_head once, gathered embedding rows, KV cache.

    Args:
        sizes: of the model.
        batch_size: requests in the step, each producing one token.
        context_tokens: mean number of tokens in a request's KV cache.
        dtype_bytes: bytes of one weight and of one KV value.
    """
    rows = batch_size * sizes.hidden
    others = sizes.norm_weights + sizes.head_weights + rows + batch_size * context_tokens * sizes.kv_values_per_token
    return sizes.layers * sizes.layer_bytes(dtype_bytes) + dtype_bytes * others
