"""The residual streams of a batch, dense and cut, side by side: how they begin, and what a dense branch computes.

Shape suffixes: N tokens, B rows, T positions, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pat_serve.training.methods.base import Method


@dataclass(kw_only=True)
class Stream:
    """The residual streams of one batch, as far as they have come.

    Attributes:
        dense_BTD: of the dense model.
        cut_BTD: of the cut one.
        settings: what else an attention is called with.
        real_BT: False for padding.
        wanted_ND: of the real tokens, what the branch at work should add to the cut stream.
    """

    dense_BTD: Tensor
    cut_BTD: Tensor
    settings: dict[str, Any]
    real_BT: Tensor
    wanted_ND: Tensor | None = None


@contextmanager
def dense(block: nn.Module | None, method: Method) -> Iterator[None]:
    """While it lasts, a block computes as in the base. Switching all adapters of a deep model would take longer."""
    with without_adapters(block), method.disabled():
        yield


@contextmanager
def without_adapters(within: nn.Module | None) -> Iterator[None]:
    """While it lasts, the adapters of a module, if one is given, are off."""
    adapted = (
        [module for module in within.modules() if isinstance(module, BaseTunerLayer)] if within is not None else []
    )
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


class _StopForwardError(Exception):
    """The first layer has been reached."""


def enter(model: Any, base: nn.Module, method: Method, batch: dict[str, Tensor]) -> Stream:
    """Run the embedding, dense and cut, and catch what the first layer is called with."""
    first = base.get_submodule("model.layers.0")
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_layer: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
        caught.append((inputs[0] if inputs else settings["hidden_states"], settings))
        raise _StopForwardError

    device = model.device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with method.disabled():
            _run(model, inputs)
        _run(model, inputs)
    finally:
        handle.remove()
    [(dense_BTD, settings), (cut_BTD, _)] = caught
    settings = {name: value for name, value in settings.items() if name != "hidden_states"}
    return Stream(dense_BTD=dense_BTD, cut_BTD=cut_BTD, settings=settings, real_BT=inputs["attention_mask"].bool())


def _run(model: Any, inputs: dict[str, Tensor]) -> None:
    try:
        model(**inputs)
    except _StopForwardError:
        return
    raise AssertionError("the decoder has no first layer")
