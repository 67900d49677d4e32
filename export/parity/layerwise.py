"""A causal language model too big for memory, run with the weights of one decoder layer at a time.

The model stands on the meta device and its own forward runs; each decoder layer fetches its weights before its turn
and drops them after it. All prompts go through each layer together, so that every weight is read once a pass. Only the
rows that the prompts use are read of the embedding, and one block of the vocabulary at a time of the head.

Shape suffixes: B prompts, T tokens, P positions, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.checkpoints.shards import TensorEntry
from pat_serve.cut.rotation import effective_gain, rotate_tensor
from pat_serve.families.architectures import EMBEDDING, FINAL_NORM, HEAD
from pat_serve.families.family import Family

_EMBEDDING_WEIGHT, _HEAD_WEIGHT = f"{EMBEDDING}.weight", f"{HEAD}.weight"
_LAYERS = "model.layers"


class Weights(Protocol):
    """Where a model's weights come from, by their names in a checkpoint."""

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor by its name in the checkpoint."""
        ...

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows of the embedding's or the head's weight; a tied head's are the embedding's."""
        ...


class StoredWeights:
    """A checkpoint's weights as they lie on disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor by its name in the checkpoint."""
        return self._checkpoint.read(name)

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows, and nothing else is read."""
        if name == _HEAD_WEIGHT and self._checkpoint.tied:
            name = _EMBEDDING_WEIGHT
        return _rows(name, self._checkpoint.tensors[name], rows)


class RotatedWeights:
    """The same, with the residual stream turned by Q: what `rotate_model` does to a loaded model.

    Products run in float32, or float64 for float64 weights. With `tied` the head is the turned embedding.
    """

    def __init__(self, weights: Weights, family: Family, rotation_DD: Tensor, *, tied: bool = False) -> None:
        self._weights, self._family, self._rotation_DD, self._tied = weights, family, rotation_DD, tied

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor of the turned model."""
        return self._turn(name, self._weights.tensor(name))

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows, turned: both tables have the hidden axis along their rows."""
        if name == _HEAD_WEIGHT and self._tied:
            name = _EMBEDDING_WEIGHT
        return self._turn(name, self._weights.rows(name, rows))

    def _turn(self, name: str, tensor: Tensor) -> Tensor:
        spec, layer, kind = self._family.match(name)
        compute = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        gain_D = None
        if spec.norm is not None and kind == "weight":
            stored_D = self._weights.tensor(f"{spec.norm.format(i=layer)}.weight")
            gain_D = effective_gain(stored_D, self._family).to(compute)
        rotation_DD = self._rotation_DD.to(compute)
        return rotate_tensor(tensor.to(compute), spec, self._family, rotation_DD, gain_D).to(tensor.dtype)


class ReplacedWeights:
    """The same, with some tensors in the place of others: those that lie in a run's files.

    Args:
        weights: all others.
        replaced: where they lie, by name.
        tied: the head is the embedding, the replaced one too.
    """

    def __init__(self, weights: Weights, replaced: Mapping[str, TensorEntry], *, tied: bool) -> None:
        self._weights, self._replaced, self._tied = weights, replaced, tied

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor by its name in the checkpoint."""
        return self._replaced[name].read() if name in self._replaced else self._weights.tensor(name)

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows, and nothing else is read."""
        if name == _HEAD_WEIGHT and self._tied:
            name = _EMBEDDING_WEIGHT
        replaced = self._replaced.get(name)
        return self._weights.rows(name, rows) if replaced is None else _rows(name, replaced, rows)


class TrainedGains:
    """The same, with the gains of some norms given."""

    def __init__(self, weights: Weights, replaced: Mapping[str, Tensor]) -> None:
        self._weights, self._replaced = weights, replaced

    def tensor(self, name: str) -> Tensor:
        """Give a whole tensor by its name in the checkpoint."""
        return self._replaced[name] if name in self._replaced else self._weights.tensor(name)

    def rows(self, name: str, rows: Sequence[int] | slice) -> Tensor:
        """Some rows of a table, which are never replaced."""
        return self._weights.rows(name, rows)


class LayerwiseModel:
    """A model on the meta device with the source of its weights.

    Args:
        model: from `meta_model`, in no wrapper yet.
        weights: gives them.
        dtype: of the weights and the computation.
        skipped: numbers of layers that hand on their inputs; their weights are not read.
    """

    def __init__(self, model: Any, weights: Weights, dtype: torch.dtype, skipped: Collection[int] = ()) -> None:
        self._decoder, self._weights, self._dtype = model.model, weights, dtype
        self._embedding: nn.Module = model.get_input_embeddings()
        # The row of padding matters to gradients alone, and torch looks for it among the few rows that are read.
        self._embedding.padding_idx = None
        # A wrapper (LoRA's) may take this name later; then it is called, around this linear.
        self.model, self._head_linear = model, model.get_output_embeddings()
        self.vocab_size = int(self._head_linear.out_features)
        for i, layer in enumerate(self._decoder.layers):
            if i in skipped:
                layer.forward = _hand_on
                continue
            parts = _parameters(layer, f"{_LAYERS}.{i}")
            layer.register_forward_pre_hook(partial(self._fetch, parts=parts))
            layer.register_forward_hook(partial(self._drop, parts=parts))
        self._fetch(parts=_parameters(self._decoder.norm, FINAL_NORM))

    @torch.no_grad()
    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states that the head reads at every position of every prompt, (P, D).

        Prompts are padded at their ends, where causal attention lets no position before see it.
        """
        longest = max(map(len, prompts))
        rows = sorted({token for prompt in prompts for token in prompt})
        number = {token: at for at, token in enumerate(rows)}
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for at, prompt in enumerate(prompts):
            ids_BT[at, : len(prompt)] = torch.tensor([number[token] for token in prompt])
        _set(self._embedding, "weight", self._weights.rows(_EMBEDDING_WEIGHT, rows).to(self._dtype))
        hidden_BTD = self._decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        return torch.cat([hidden_BTD[at, : len(prompt)] for at, prompt in enumerate(prompts)])

    @torch.no_grad()
    def head_block(self, hidden_PD: Tensor, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of a block of the vocabulary."""
        _set(self._head_linear, "weight", self._weights.rows(_HEAD_WEIGHT, slice(start, stop)).to(self._dtype))
        head = self.model.get_output_embeddings()
        whole = {name: part.weight for name, part in getattr(head, "lora_B", {}).items()}
        try:
            for name, weight_VR in whole.items():
                _set(head.lora_B[name], "weight", weight_VR[start:stop])
            logits: Tensor = head(hidden_PD)
        finally:
            for name, weight_VR in whole.items():
                _set(head.lora_B[name], "weight", weight_VR)
        return logits

    def _fetch(self, *_: Any, parts: Iterable[tuple[nn.Module, str, str]]) -> None:
        for module, kind, name in parts:
            _set(module, kind, self._weights.tensor(name).to(self._dtype))

    def _drop(self, *_: Any, parts: Iterable[tuple[nn.Module, str, str]]) -> None:
        for module, kind, _name in parts:
            _set(module, kind, getattr(module, kind).detach().to("meta"))


def _rows(name: str, entry: TensorEntry, rows: Sequence[int] | slice) -> Tensor:
    with safe_open(entry.shard, framework="pt") as file:
        stored = file.get_slice(name)
        if isinstance(rows, slice):
            return torch.as_tensor(stored[rows])
        return torch.cat([torch.as_tensor(stored[row : row + 1]) for row in rows])


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _parameters(root: nn.Module, prefix: str) -> list[tuple[nn.Module, str, str]]:
    """Module, attribute and checkpoint name of every parameter under a module."""
    return [
        (module, kind, ".".join(filter(None, (prefix, path, kind))))
        for path, module in root.named_modules()
        for kind, _ in module.named_parameters(recurse=False)
    ]


def _set(module: nn.Module, kind: str, value: Tensor) -> None:
    setattr(module, kind, nn.Parameter(value, requires_grad=False))
