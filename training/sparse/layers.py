"""A decoder whose layers are in memory one at a time: how its streams begin, and each layer with the weights it has.

Shape suffixes: B rows, T positions, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.families.architectures import EMBEDDING

# Rows of the embedding's table that are read at a time.
_TABLE_ROWS = 8192


@dataclass(kw_only=True)
class Stream:
    """The residual stream of one batch, as far as it has come.

    Attributes:
        hidden_BTD: what the next layer reads.
        settings: what else a layer is called with.
        real_BT: False for padding.
    """

    hidden_BTD: Tensor
    settings: dict[str, Any]
    real_BT: Tensor


class _StopForwardError(Exception):
    """Enough of the model has run."""


class Layers:
    """The layers of a checkpoint, each read when its turn comes.

    Args:
        checkpoint: gives the weights.
        dtype: of the computation.
        device: of it.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoConfig

        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self.model: Any = meta_model(AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True))
        self.model.config.use_cache = False
        # Rotary frequencies have no weights; they are made with the model.
        self.model.model.rotary_emb.to(device)

    def stored(self, name: str) -> Tensor:
        """A tensor as the checkpoint has it, whose dtype may tell more than that of the computation."""
        return self._checkpoint.read(name).to(self._device)

    @torch.no_grad()
    def enter(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Stream]:
        """The streams as the first layer reads them.

        Args:
            batches: input_ids and attention_mask.
        """
        embedding, streams = self.model.get_input_embeddings(), []
        # Rows are numbered anew here, and the padding's number may be larger than all of them.
        embedding.padding_idx = None
        used, numbered = torch.unique(
            torch.cat([batch["input_ids"].flatten() for batch in batches]), return_inverse=True
        )
        _set(embedding, "weight", self._table_rows(used).to(self._device, self._dtype))
        at = 0
        for batch in batches:
            ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"].to(self._device)
            numbers_BT = numbered[at : at + ids_BT.numel()].view_as(ids_BT).to(self._device)
            at += ids_BT.numel()
            streams.append(self._caught(numbers_BT, mask_BT))
        _set(embedding, "weight", embedding.weight.detach().to("meta"))
        return streams

    def _table_rows(self, used: Tensor) -> Tensor:
        entry = self._checkpoint.tensors[f"{EMBEDDING}.weight"]
        rows = []
        for start in range(0, entry.shape[0], _TABLE_ROWS):
            wanted = used[(used >= start) & (used < start + _TABLE_ROWS)]
            if len(wanted):
                rows.append(entry.read(start, min(start + _TABLE_ROWS, entry.shape[0]))[wanted - start])
        return torch.cat(rows)

    def _caught(self, numbers_BT: Tensor, mask_BT: Tensor) -> Stream:
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(_layer: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
            caught.append((inputs[0] if inputs else settings["hidden_states"], settings))
            raise _StopForwardError

        handle = self.model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model.model(input_ids=numbers_BT, attention_mask=mask_BT, use_cache=False)
        except _StopForwardError:
            pass
        finally:
            handle.remove()
        [(hidden_BTD, settings)] = caught
        settings = {name: value for name, value in settings.items() if name != "hidden_states"}
        return Stream(hidden_BTD=hidden_BTD, settings=settings, real_BT=mask_BT.bool())

    @contextmanager
    def layer(self, number: int, replaced: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """A layer with its weights, for as long as the context lasts.

        Args:
            number: of the layer.
            replaced: tensors that take the place of the checkpoint's, by their names there.
        """
        layer: nn.Module = self.model.model.layers[number]
        prefix, given = f"model.layers.{number}.", replaced or {}
        parts = [(name, module, kind) for name, module, kind in _parameters(layer)]
        try:
            for name, module, kind in parts:
                tensor = given.get(prefix + name)
                tensor = self._checkpoint.read(prefix + name) if tensor is None else tensor
                _set(module, kind, tensor.to(self._device, self._dtype))
            yield layer
        finally:
            for _, module, kind in parts:
                _set(module, kind, getattr(module, kind).detach().to("meta"))


@torch.no_grad()
def advance(layer: nn.Module, streams: Sequence[Stream]) -> None:
    """Take every stream through a layer."""
    for stream in streams:
        output = layer(stream.hidden_BTD, **stream.settings)
        stream.hidden_BTD = output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def listen(layer: nn.Module, linear: nn.Module, streams: Sequence[Stream], hear: Callable[[Tensor], None]) -> None:
    """Give the inputs of a linear in a layer, of the real tokens (N, I), stream after stream; the streams stay."""

    def catch(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _StopForwardError

    caught: list[Tensor] = []
    handle = linear.register_forward_pre_hook(catch)
    try:
        for stream in streams:
            try:
                layer(stream.hidden_BTD, **stream.settings)
            except _StopForwardError:
                hear(caught.pop()[stream.real_BT])
    finally:
        handle.remove()


def _parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name in the layer, module and attribute of every parameter."""
    for path, module in layer.named_modules():
        for kind, _ in module.named_parameters(recurse=False):
            yield f"{path}.{kind}", module, kind


def _set(module: nn.Module, kind: str, value: Tensor) -> None:
    setattr(module, kind, nn.Parameter(value, requires_grad=False))
