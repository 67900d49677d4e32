"""Round a finished float32 export to four bits on what its linears really read, one layer in memory at a time.

All calibration prompts pass each layer twice: first as it is, while the second moments of every linear's inputs are
summed, and then with its rounded weights, so that the next layer's moments hold the errors of all before it.

Shape suffixes: B prompts, T tokens, N real tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.export.formats.gptq import dequantize_groups, gptq, group_scales, pack_codes
from pat_serve.export.parity.layerwise import LayerwiseModel, StoredWeights
from pat_serve.terminal.progress import progress_bar

# Tokens of a calibration, and of one of its windows, at most.
CALIBRATION_TOKENS, PROMPT_TOKENS = 32_768, 512


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where four-bit weights get the inputs that they are rounded for.

    Attributes:
        source: what the prompts come from, for the record and the card.
        prompts: gives token ids, from the folder of the tokenizer; called once, before anything is written.
    """

    source: str
    prompts: Callable[[Path], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One four-bit weight: int32 (O, I / 8) of packed codes, and the scales (O, groups)."""

    packed: Tensor
    scale: Tensor


def bounded(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first CALIBRATION_TOKENS of the prompts, one after the other, in windows of PROMPT_TOKENS.

    All windows pass a layer at once, and prompts of their own lengths would be padded to the longest. GPTQ's authors
    join their texts likewise (arXiv 2210.17323).
    """
    joined = list(islice(chain.from_iterable(prompts), CALIBRATION_TOKENS))
    return [joined[start : start + PROMPT_TOKENS] for start in range(0, len(joined), PROMPT_TOKENS)]


def round_layers(
    folder: Path, prompts: list[list[int]], group_size: int, scale_dtype: torch.dtype
) -> dict[str, Rounded]:
    """Round every linear of the decoder layers by GPTQ.

    Args:
        folder: of a finished float32 export.
        prompts: token ids.
        group_size: inputs that share a scale.
        scale_dtype: in which the scales are stored.

    Returns:
        by the weight's name in the checkpoint.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = LayerwiseModel(meta_model(config), StoredWeights(open_checkpoint(str(folder))), torch.float32)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    # The model pads the prompts at their ends to the longest.
    real_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    found: dict[str, Rounded] = {}
    layers = list(model.model.model.layers)
    with progress_bar() as progress:
        task = progress.add_task("quantise to int4", total=len(layers))

        def round_layer(layer: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any], *, prefix: str) -> None:
            for path, moments_II in _moments(layer, inputs, settings, real_BT).items():
                linear: Any = layer.get_submodule(path)
                weight_OI = linear.weight.detach()
                scale_OG = group_scales(weight_OI, moments_II.diagonal(), group_size, scale_dtype)
                codes_OI = gptq(weight_OI, moments_II, scale_OG)
                found[f"{prefix}.{path}.weight"] = Rounded(packed=pack_codes(codes_OI), scale=scale_OG)
                linear.weight = nn.Parameter(dequantize_groups(codes_OI, scale_OG), requires_grad=False)
            progress.advance(task)

        for number, layer in enumerate(layers):
            # The model's own hook, which fetches the weights, was registered before this one and so runs before it.
            hook = partial(round_layer, prefix=f"model.layers.{number}")
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        model.hidden_states(prompts)
    return found


@torch.no_grad()
def _moments(layer: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any], real_BT: Tensor) -> dict[str, Tensor]:
    """Second moments (I, I) of the inputs of each linear of a layer, by the linear's path, over the real tokens."""
    caught: dict[str, Tensor] = {}
    # Linears that read the same tensor (q, k and v) share its moments.
    last: list[tuple[Tensor, Tensor]] = []

    def catch(_linear: nn.Module, given: tuple[Any, ...], *, path: str) -> None:
        if not last or last[-1][0] is not given[0]:
            x_NI = given[0][real_BT]
            last[:] = [(given[0], x_NI.T @ x_NI / len(x_NI))]
        caught[path] = last[-1][1]

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(partial(catch, path=path))
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        layer.forward(*inputs, **settings)
    finally:
        for handle in handles:
            handle.remove()
    return caught
