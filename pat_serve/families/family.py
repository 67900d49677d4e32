"""A model family: the lines of its tensors, and the rules of its config class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pat_serve.cut.axes import HIDDEN, Dim, dim_length
from pat_serve.errors import UnknownTensor

if TYPE_CHECKING:
    from pat_serve.shapes.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One kind of tensor in a checkpoint.

    Attributes:
        module: dotted module name, with `{i}` for the layer's number.
        dims: the weight's dimensions in order; a linear's are (out, in), an embedding's (vocab, hidden).
        writes_residual: the module's output is added to (or starts) the residual stream, so an HSM sits on it.
        hidden_norm: the tensor is the gain of an RMSNorm over the hidden dimension.
        norm: for a linear that reads the residual stream, the module (with `{i}`) of the hidden RMSNorm that feeds it.
        head_norm: an RMSNorm over each head follows, with the config's one rms_norm_eps.
        lora: a linear that fine-tuning adapts by default.
        bias: the module may carry a bias; it runs along the weight's first dimension.
    """

    module: str
    dims: tuple[Dim, ...]
    writes_residual: bool = False
    hidden_norm: bool = False
    norm: str | None = None
    head_norm: bool = False
    lora: bool = False
    bias: bool = False

    @property
    def hidden_dimension(self) -> int | None:
        """Which of the weight's dimensions is the residual stream's; None if no one is."""
        return next((at for at, dim in enumerate(self.dims) if any(piece.axis == HIDDEN for piece in dim)), None)

    def has_hidden(self, kind: str) -> bool:
        """The module's "weight" or "bias" has a dimension of the residual stream."""
        return self.hidden_dimension in range(len(self.dims_of(kind)))

    def dims_of(self, kind: str) -> tuple[Dim, ...]:
        """The dimensions of the module's "weight" or "bias"."""
        return self.dims if kind == "weight" else self.dims[:1]

    def shape(self, kind: str, sizes: ModelSizes) -> tuple[int, ...]:
        """The shape of the module's "weight" or "bias" in a model of these sizes."""
        return tuple(dim_length(dim, sizes) for dim in self.dims_of(kind))


@dataclass(frozen=True, kw_only=True)
class ExportAs:
    """Another stock class that computes the same and, unlike the family's own, honours an explicit head_dim everywhere.

    Attributes:
        model_type: of the other class.
        architecture: of the other class.
        settings: what its config needs to compute the same.
        dropped: settings of the base's config that it does not know.
        zero_biases: modules (with `{i}`) that carry a bias there and none here.
        filled: what the base's class fills in for settings that config.json leaves out, where the other class would
            fill in something else.
        without: settings that the base must not have switched on, since the other class cannot follow.
        hidden_multiple_of_heads: as in `Family`.
    """

    model_type: str
    architecture: str
    settings: Mapping[str, Any]
    dropped: tuple[str, ...]
    zero_biases: tuple[str, ...] = ()
    filled: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    hidden_multiple_of_heads: bool = False


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
        export_as: the class of an export whose width or heads are cut, when it is not the base's own.
        uneven: the class of an export whose hidden_size is no multiple of its heads, where the own one refuses that.
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
    uneven: ExportAs | None = None

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

    def class_of_export(
        self, base: ModelSizes, exported: ModelSizes, config: Mapping[str, Any] | None = None
    ) -> ExportAs | None:
        """The stock class of an export, if it is not the base's own.

        Args:
            base: sizes of the base.
            exported: sizes of the export; `obstacles` says whether a class takes them.
            config: of the base, whose biases stand in the way of some classes; a plain one by default.
        """
        if (base.hidden, base.heads) == (exported.hidden, exported.heads):
            return None
        if self.uneven and exported.hidden % exported.heads:
            biased = any((config or {}).get(name) for name in self.uneven.without)
            return None if biased else self.uneven
        return self.export_as

    def wants_multiple_of_heads(
        self, base: ModelSizes, exported: ModelSizes, config: Mapping[str, Any] | None = None
    ) -> bool:
        """The stock class of an export wants a hidden_size that is a multiple of its heads."""
        return (self.class_of_export(base, exported, config) or self).hidden_multiple_of_heads

    def obstacles(self, base: ModelSizes, exported: ModelSizes, config: Mapping[str, Any] | None = None) -> list[str]:
        """Why no stock class takes an export of these sizes, in sentences; empty if one does.

        Kernels and tensor parallelism have wishes of their own (`pat_serve.shapes.fitness`).

        Args:
            base: sizes of the base.
            exported: sizes of the export.
            config: of the base; a plain one by default.
        """
        if not self.wants_multiple_of_heads(base, exported, config) or exported.hidden % exported.heads == 0:
            return []
        other = self.class_of_export(base, exported, config)
        name = other.architecture if other else self.architecture
        return [f"{name} wants a hidden_size that is a multiple of its {exported.heads} heads, not {exported.hidden}"]

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
            found="a name that its table (pat_serve/families/architectures.py) does not hold",
            fix="Export a plain checkpoint of this family, or add the tensor to the table.",
        )

    def modules(self, num_layers: int) -> Iterator[tuple[str, TensorSpec, int | None]]:
        """Every module of a model with its line in the table and its layer's number (None outside the layers)."""
        for spec in self.tensors:
            layers: Iterable[int | None] = range(num_layers) if "{i}" in spec.module else [None]
            for i in layers:
                yield spec.module.format(i=i), spec, i
