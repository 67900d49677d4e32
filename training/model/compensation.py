"""Choose inside the layers, and make up for what is cut: least squares on calibration data, layer by layer.

With x the input of a linear in the dense model and z what is left of the same input in the cut one, the best linear
guess of W x is W' z, W' = W E[x z^T] E[z z^T]^-1. Three kinds of linears make up for what is cut:

- A reader of the stream, whose channels are cut. Then x is the norm's output, whatever the reader.
- The output of an attention whose key-value groups are cut, and that of an MLP whose channels are.
- The MLP before layers that are dropped: it should add what they added too (ReplaceMe, arXiv 2505.02819).

The streams tell what the last two should add: the dense stream behind the branch, and behind the dropped layers after
it, less the cut stream before the branch. So the addition also makes up for losses of earlier cuts. Such a target is as
good for outputs that lose no inputs, and `full` sets those of every attention and MLP.

Much of such a target is nothing that the inputs explain, and calibration data are few. So these weights are held back
towards those that there are (`least_squares.py`). What a norm gives is nearly all explained, and its readers are not.

A head that stays tied to the embedding has no weights of its own: after a rotation the last norm's gain is fitted in
their place (`tie.py`).

W' takes the place of the weight (`full`), or the difference W' - W is given to the linear's LoRA factors at their rank,
by the singular values that matter to z (`lora`); then plan, export and the dense teacher know nothing of it. Starting
LoRA from a decomposition is LoftQ's idea (arXiv 2310.08659), which makes up for quantization with it.

The layers are walked in order, each on inputs that have passed all cuts and refits before it, as one-shot pruning does
(arXiv 2410.15567 and its forerunners). All rows pass the dense branch first, then the cut one's readers are set, then
its writer; so the dense model runs once, and the cut one once or, where its writer is set, twice.

Shape suffixes: N tokens, B rows, T positions, D hidden_size, I inputs of a linear, K those that stay, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pat_serve.cut.axes import AXES
from pat_serve.cut.cuts import line_name
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import track
from pat_serve.training.choices import InnerChoice, Inputs
from pat_serve.training.methods.base import Method
from pat_serve.training.model.branches import Branch, branches
from pat_serve.training.model.least_squares import SHRINKAGE, Moments
from pat_serve.training.model.linears import is_tied, product, start_lora, unwrapped, weight_of
from pat_serve.training.model.streams import Stream, dense, enter, without_adapters
from pat_serve.training.model.tie import fitted_gain
from pat_serve.training.ranks import same_on_all

Refit = Literal["none", "lora", "full"]


@dataclass(kw_only=True)
class Compensated:
    """Decisions of the walk.

    Attributes:
        kept: int64 indices that stay, by line of the inner axes.
        replaced: names of the linears whose weight was replaced.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Walk:
    """The settings of one walk, and what came of it so far."""

    base: nn.Module
    method: Method
    kept_K: Tensor | None
    refit: Refit
    shrinkage: float
    counts: Mapping[str, int]
    sizes: ModelSizes
    choose: Callable[[str, int, Inputs], Tensor]
    streams: Sequence[Stream]
    found: Compensated = field(default_factory=Compensated)
    masks: list[RemovableHandle] = field(default_factory=list)


@torch.no_grad()
def compensate(
    model: Any,
    method: Method,
    batches: Sequence[dict[str, Tensor]],
    *,
    kept_K: Tensor | None,
    layers: Sequence[int],
    counts: Mapping[str, int],
    choices: Mapping[str, InnerChoice],
    known: Mapping[str, Tensor],
    refit: Refit,
    shrinkage: float = SHRINKAGE,
) -> Compensated:
    """Walk the layers: choose what stays inside them, and set every linear that makes up for what is cut.

    Args:
        model: the PEFT model with the method attached; where it closes channels, they are closed.
        method: switches its modules off for the dense model.
        batches: input_ids and attention_mask.
        kept_K: int64, ascending: the channels of the stream that are open; None for all.
        layers: that stay, as the base numbers them.
        counts: indices to keep, by inner axis (ffn, kv_groups), where some are cut.
        choices: what chooses them, by inner axis.
        known: indices that were chosen before, by line: of a run that is resumed.
        refit: where what makes up for the cut goes.
        shrinkage: how firmly weights are held where they are (`Moments.change`).
    """

    def choose(axis: str, layer: int, inputs: Inputs) -> Tensor:
        chosen = known.get(line_name(axis, layer))
        return choices[axis].keep(inputs, counts[axis]) if chosen is None else chosen

    base, sizes = model.get_base_model(), method.base
    was_training = model.training
    model.eval()
    walk = _Walk(
        base=base,
        method=method,
        kept_K=kept_K,
        refit=refit,
        shrinkage=shrinkage,
        counts=counts,
        sizes=sizes,
        choose=choose,
        streams=[enter(model, base, method, batch) for batch in batches],
    )
    walked, head = branches(method.family, sizes.layers)
    stays = set(layers)
    try:
        # An adapter that is not started here adds nothing yet, and costs a pass as much as if it did.
        with without_adapters(None if refit == "lora" else base):
            for at, branch in track(list(enumerate(walked)), "make up for the cut", len(walked)):
                if branch.layer in stays:
                    _pass(walk, branch, _dropped_after(walked, at, stays))
                elif not any(before.layer in stays for before in walked[:at]):
                    # Dropped, with nothing before it to make up for it.
                    _advance_dense(walk, [branch])
            if kept_K is not None and refit != "none":
                if method.dense_gain_D is None:
                    _set_readers(walk, head, _reader_moments(walk, head))
                else:
                    _set_last_gain(walk, head, kept_K)
    finally:
        for handle in walk.masks:
            handle.remove()
    model.train(was_training)
    return walk.found


def _dropped_after(walked: Sequence[Branch], at: int, stays: set[int]) -> list[Branch]:
    """The branches of the dropped layers right behind one."""
    dropped = []
    for branch in walked[at + 1 :]:
        if branch.layer in stays:
            break
        dropped.append(branch)
    return dropped


def _pass(walk: _Walk, branch: Branch, dropped: Sequence[Branch]) -> None:
    """One branch that stays, and the dropped ones behind it."""
    axis, refits = branch.inner_axis, walk.refit != "none"
    assert axis is not None
    assert branch.layer is not None
    # With `lora` only the writers that lose something are set: an adapter has a low rank.
    writes = axis in walk.counts or walk.refit == "full" or bool(dropped and refits)
    readers = _reader_moments(walk, branch) if refits and walk.kept_K is not None else None
    _advance_dense(walk, [branch, *dropped], wants=writes)
    if readers is not None:
        _set_readers(walk, branch, readers)
    if writes:
        _set_writer(walk, branch)
    for stream in walk.streams:
        stream.cut_BTD = stream.cut_BTD + branch.added(walk.base, stream.cut_BTD, stream.settings)
        stream.wanted_ND = None


def _advance_dense(walk: _Walk, passed: Sequence[Branch], *, wants: bool = False) -> None:
    """Take the dense stream through some branches; and keep what the cut one should be given, if asked to."""
    for stream in walk.streams:
        before_BTD = stream.dense_BTD
        total_BTD = (before_BTD - stream.cut_BTD).float() if wants else None
        for branch in passed:
            # Where no adapter is to be started, all of them are off throughout.
            with dense(branch.block(walk.base) if walk.refit == "lora" else None, walk.method):
                added_BTD = branch.added(walk.base, stream.dense_BTD, stream.settings)
            stream.dense_BTD = stream.dense_BTD + added_BTD
            if total_BTD is not None:
                # Summed by itself: the streams' own difference would be rounded like the streams.
                total_BTD += added_BTD
        if total_BTD is not None:
            stream.wanted_ND = total_BTD[stream.real_BT].to(before_BTD.dtype)


def _reader_moments(walk: _Walk, branch: Branch) -> Moments:
    """Moments of a norm's outputs in the dense and in the cut model."""
    norm, moments = walk.base.get_submodule(branch.norm), Moments()
    for stream in walk.streams:
        z_ND = norm(stream.cut_BTD)[stream.real_BT]
        moments.add(norm(stream.dense_BTD)[stream.real_BT], z_ND if walk.kept_K is None else z_ND[:, walk.kept_K])
    return moments


def _set_readers(walk: _Walk, branch: Branch, moments: Moments) -> None:
    kept_K = walk.kept_K
    assert kept_K is not None
    now_DK = torch.eye(walk.sizes.hidden, device=kept_K.device)[:, kept_K]
    change_DK, factor_KK = moments.change(now_DK, shrinkage=0.0)
    # The change and the factor need float64; their product times a weight is decomposed in float32.
    felt_DK = (change_DK @ factor_KK).float()
    for name in branch.readers:
        linear: Any = walk.base.get_submodule(name)
        weight = weight_of(linear)
        if walk.refit == "lora":
            if hasattr(linear, "lora_A"):
                start_lora(linear, product(weight, felt_DK), factor_KK, kept_K)
        elif not is_tied(walk.base, weight):
            refitted_OK = product(weight, change_DK.float()).add_(weight[:, kept_K])
            _replace(walk, name, refitted_OK, kept_K)


def _set_last_gain(walk: _Walk, head: Branch, kept_K: Tensor) -> None:
    """The last norm of a turned model makes up for what a head that stays tied cannot do."""
    method, norm = walk.method, walk.base.get_submodule(head.norm)
    measured, dense_gain_D, stored = method.calibration, method.dense_gain_D, norm.weight
    assert measured is not None
    assert measured.rotation_DD is not None
    assert dense_gain_D is not None
    assert isinstance(stored, Tensor)
    offset = method.family.norm_offset
    stored.fill_(1.0 - offset)
    moments = _reader_moments(walk, head)
    xz_DK, zz_KK = moments.yz_OI, moments.second()
    assert xz_DK is not None
    rotation_DD = measured.rotation_DD.to(zz_KK)
    mixed_DD = rotation_DD.T @ (dense_gain_D.to(zz_KK)[:, None] * rotation_DD)
    embedding = walk.base.get_input_embeddings().weight  # type: ignore[operator]  # a causal model's
    stored.copy_(fitted_gain(embedding, mixed_DD, xz_DK, zz_KK, kept_K.to(zz_KK.device)) - offset)
    # The plan gets what the model has.
    method.calibration = replace(measured, last_gain_D=stored.detach().float().cpu())


def _set_writer(walk: _Walk, branch: Branch) -> None:
    """Choose which of a writer's inputs stay, if some are cut, and set it to give what is wanted from those."""
    assert branch.writer is not None
    assert branch.inner_axis is not None
    assert branch.layer is not None
    linear: Any = walk.base.get_submodule(branch.writer)
    weight, moments = weight_of(linear), Moments()
    caught: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0]))
    try:
        for stream in walk.streams:
            branch.added(walk.base, stream.cut_BTD, stream.settings)
            y_ND = stream.wanted_ND
            assert y_ND is not None
            bias = unwrapped(linear).bias
            moments.add(y_ND if bias is None else y_ND - bias, caught.pop()[stream.real_BT])
    finally:
        handle.remove()
    width = weight.shape[1]
    kept_I = torch.arange(width)
    if branch.inner_axis in walk.counts:
        kept_I = _choose(walk, branch, weight, moments)
        mask_I = torch.zeros(width, dtype=weight.dtype).index_fill_(0, kept_I, 1.0).to(weight.device)
        walk.masks.append(linear.register_forward_pre_hook(partial(_masked, mask_I=mask_I)))
    if walk.refit == "none":
        return
    kept_I = kept_I.to(weight.device)
    now_OK = weight[:, kept_I]
    change_OK, factor_KK = moments.change(now_OK, kept_I, shrinkage=walk.shrinkage)
    if walk.refit == "full":
        _replace(walk, branch.writer, change_OK.add_(now_OK), kept_I)
    elif hasattr(linear, "lora_A"):
        start_lora(linear, (change_OK @ factor_KK).float(), factor_KK, kept_I)


def _choose(walk: _Walk, branch: Branch, weight: Tensor, moments: Moments) -> Tensor:
    """Positions (K,) of a writer's inputs that stay."""
    assert branch.inner_axis is not None
    assert branch.layer is not None
    block = weight.shape[1] // AXES[branch.inner_axis].length(walk.sizes)
    inputs = Inputs(second_II=moments.second(), weight_OI=weight.double(), block=block)
    kept = walk.choose(branch.inner_axis, branch.layer, inputs)
    same_on_all(kept.to(weight.device), f"what is kept of {line_name(branch.inner_axis, branch.layer)}")
    walk.found.kept[line_name(branch.inner_axis, branch.layer)] = kept
    return (kept[:, None] * block + torch.arange(block)).flatten()


def _masked(_linear: nn.Module, inputs: tuple[Tensor, ...], *, mask_I: Tensor) -> tuple[Tensor, ...]:
    return (inputs[0] * mask_I, *inputs[1:])


def _replace(walk: _Walk, name: str, weight_OK: Tensor, kept_K: Tensor) -> None:
    """Give a linear new weights, with zeros for the inputs that are cut."""
    weight = weight_of(walk.base.get_submodule(name))
    weight.data.zero_()
    weight.data[:, kept_K] = weight_OK.to(weight)
    walk.found.replaced.append(name)
