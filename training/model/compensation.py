"""Start the adapter where it makes up for the cut: least squares on calibration data, layer by layer.

With x the normalised input of a reader in the dense model and z the kept channels of the same input in the cut one, the
best linear guess of x is B z, B = E[x z^T] E[z z^T]^-1, whatever the reader; so W should become W B. The difference
W B - W[:, K] is given to the reader's LoRA factors, at their rank, by the singular values that matter to z. The base's
weights stay as they are: the plan, the export and the dense teacher know nothing of it.

The layers are walked in order, each on inputs that have passed the compensated layers before it, as one-shot pruning
does (arXiv 2410.15567 and its forerunners). Starting LoRA from a decomposition is LoftQ's idea (arXiv 2310.08659),
which makes up for quantization with it. A layer is two branches of the stream, h + attention(norm(h)) and
h + mlp(norm(h)). All rows pass the first branch before the second one's readers are set, so that the dense and the cut
model each run every branch once.

Shape suffixes: N tokens, D hidden_size, K kept channels, O outputs of a reader, R rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pat_serve.family import Family
from pat_serve.rotation import ROWS_AT_ONCE
from pat_serve.terminal.progress import track
from pat_serve.training.methods.base import Method

# Of the mean diagonal of E[z z^T]: calibration data are few, and channels nearly dependent.
RIDGE = 1e-3


@dataclass(kw_only=True)
class _Batch:
    """The residual streams of one batch, as far as they have come.

    Attributes:
        dense_BTD: of the dense model.
        cut_BTD: of the cut one.
        settings: what else an attention is called with.
        real_BT: False for padding.
    """

    dense_BTD: Tensor
    cut_BTD: Tensor
    settings: dict[str, Any]
    real_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One of the sums that the residual stream consists of: h + block(norm(h)).

    Attributes:
        norm: name of the hidden norm.
        readers: names of the linears that read it.
        attends: the block is an attention, which is called with the layer's settings.
    """

    norm: str
    readers: tuple[str, ...]
    attends: bool

    def block(self, base: nn.Module) -> nn.Module:
        """The attention or the MLP."""
        [name] = {reader.rpartition(".")[0] for reader in self.readers}
        return base.get_submodule(name)

    def advance(self, base: nn.Module, hidden_BTD: Tensor, settings: dict[str, Any]) -> Tensor:
        """The stream after this branch. No family of the table computes anything else, in evaluation mode."""
        block, normed_BTD = self.block(base), base.get_submodule(self.norm)(hidden_BTD)
        added_BTD: Tensor = block(hidden_states=normed_BTD, **settings)[0] if self.attends else block(normed_BTD)
        return hidden_BTD + added_BTD


def branches(family: Family, num_layers: int) -> tuple[list[Branch], Branch]:
    """All branches in the order in which the stream passes them, and the head's, which adds nothing to it."""
    readers: dict[str, list[str]] = {}
    for name, spec, i in family.modules(num_layers):
        if spec.norm is not None:
            readers.setdefault(spec.norm.format(i=i), []).append(name)
    norms = [spec.module for spec in family.tensors if spec.hidden_norm]
    inner = [norm for norm in norms if "{i}" in norm]
    [last] = set(norms) - set(inner)
    walked = [
        Branch(norm=name, readers=tuple(readers[name]), attends=norm == inner[0])
        for i in range(num_layers)
        for norm in inner
        for name in [norm.format(i=i)]
    ]
    return walked, Branch(norm=last, readers=tuple(readers[last]), attends=False)


@torch.no_grad()
def compensate(
    model: Any, method: Method, family: Family, num_layers: int, batches: Sequence[dict[str, Tensor]]
) -> None:
    """Set the LoRA factors of every reader of the residual stream.

    Args:
        model: the PEFT model with the method attached and the gate hard.
        method: switches its modules off for the dense model.
        family: the base's architecture.
        num_layers: of the base.
        batches: input_ids and attention_mask.
    """
    base = model.get_base_model()
    kept_K = method.kept_channels()
    was_training = model.training
    model.eval()
    streams = [_enter(model, base, method, batch) for batch in batches]
    walked, head = branches(family, num_layers)
    for branch in track(walked, "compensate for the cut", len(walked)):
        _compensate_branch(base, branch, kept_K, streams)
        # One model after the other, in place: both sides' new states of all rows would be twice the memory.
        with _dense(branch.block(base), method):
            for stream in streams:
                stream.dense_BTD = branch.advance(base, stream.dense_BTD, stream.settings)
        for stream in streams:
            stream.cut_BTD = branch.advance(base, stream.cut_BTD, stream.settings)
    _compensate_branch(base, head, kept_K, streams)
    model.train(was_training)


def _compensate_branch(base: nn.Module, branch: Branch, kept_K: Tensor, streams: Sequence[_Batch]) -> None:
    norm, moments = base.get_submodule(branch.norm), _Moments(kept_K)
    for stream in streams:
        moments.add(norm(stream.dense_BTD)[stream.real_BT], norm(stream.cut_BTD)[stream.real_BT])
    _set_readers(base, branch.readers, moments)


@contextmanager
def _dense(block: nn.Module, method: Method) -> Iterator[None]:
    """While it lasts, a block computes as in the base: switching all adapters of a deep model takes longer than it."""
    adapted = [module for module in block.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        with method.disabled():
            yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


class _Moments:
    """E[z z^T] and E[x z^T] of one norm's outputs, summed over the batches, float64."""

    def __init__(self, kept_K: Tensor) -> None:
        self.kept_K = kept_K
        self.zz_KK: Tensor | None = None
        self.xz_DK: Tensor | None = None

    def add(self, x_ND: Tensor, z_ND: Tensor) -> None:
        z_NK = z_ND[:, self.kept_K].float()
        zz_KK, xz_DK = (z_NK.T @ z_NK).double(), (x_ND.float().T @ z_NK).double()
        self.zz_KK = zz_KK if self.zz_KK is None else self.zz_KK + zz_KK
        self.xz_DK = xz_DK if self.xz_DK is None else self.xz_DK + xz_DK

    def solve(self) -> tuple[Tensor, Tensor]:
        """B - [I; 0] (D, K), and the lower Cholesky factor of E[z z^T] with its ridge (K, K)."""
        assert self.zz_KK is not None
        assert self.xz_DK is not None
        ridge_K = torch.full((len(self.zz_KK),), RIDGE * float(self.zz_KK.diagonal().mean()), device=self.zz_KK.device)
        factor_KK = torch.linalg.cholesky(self.zz_KK + torch.diag(ridge_K.double()))
        guess_DK = torch.cholesky_solve(self.xz_DK.T, factor_KK).T
        guess_DK[self.kept_K, torch.arange(len(self.kept_K))] -= 1
        return guess_DK, factor_KK


def low_rank_update(felt_OK: Tensor, factor_KK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, R) and (R, K) whose product is nearest to a change of weights, felt by inputs of a second moment.

    The nearest is by ||(change - B A) F|| with F F^T = E[z z^T], whichever the root F, so a singular value
    decomposition in the whitened space; both factors get the same norm.

    Args:
        felt_OK: the change of the weights times F, float32.
        factor_KK: F, the lower Cholesky factor, float64.
        rank: R.
    """
    left_OR, values_R, right_KR = torch.svd_lowrank(felt_OK, q=min(rank + 8, *felt_OK.shape), niter=4)
    left_OR, right_KR = left_OR[:, :rank] * values_R[:rank].sqrt(), right_KR[:, :rank] * values_R[:rank].sqrt()
    a_RK = torch.linalg.solve_triangular(factor_KK, right_KR.T.double(), upper=False, left=False).float()
    balance = (a_RK.norm() / left_OR.norm()).sqrt()
    return left_OR * balance, a_RK / balance


def _set_readers(base: nn.Module, names: Sequence[str], moments: _Moments) -> None:
    guess_DK, factor_KK = moments.solve()
    # The guess and the factor need float64; their product times a weight is decomposed in float32.
    felt_DK = (guess_DK @ factor_KK).float()
    for name in names:
        reader: Any = base.get_submodule(name)
        if not hasattr(reader, "lora_A"):
            continue
        a, b = reader.lora_A["default"].weight, reader.lora_B["default"].weight
        felt_OK = _product(reader.base_layer.weight, felt_DK)
        if not felt_OK.any():
            # A weight of zeros lacks nothing, and an adapter of zeros would learn nothing.
            continue
        b_OR, a_RK = low_rank_update(felt_OK, factor_KK, len(a))
        scaling = reader.scaling["default"] ** 0.5
        a.zero_()
        a[: len(a_RK), moments.kept_K] = (a_RK / scaling).to(a)
        b.zero_()
        b[:, : b_OR.shape[1]] = (b_OR / scaling).to(b)


def _product(weight_OD: Tensor, felt_DK: Tensor) -> Tensor:
    """Their product in float32, by rows: a 16-bit head in float32 can be larger than the rest of the model."""
    product_OK = torch.empty(len(weight_OD), felt_DK.shape[1], device=weight_OD.device)
    for at in range(0, len(weight_OD), ROWS_AT_ONCE):
        torch.mm(weight_OD[at : at + ROWS_AT_ONCE].float(), felt_DK, out=product_OK[at : at + ROWS_AT_ONCE])
    return product_OK


class _StopForwardError(Exception):
    """The first layer has been reached."""


def _enter(model: Any, base: nn.Module, method: Method, batch: dict[str, Tensor]) -> _Batch:
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
    return _Batch(dense_BTD=dense_BTD, cut_BTD=cut_BTD, settings=settings, real_BT=inputs["attention_mask"].bool())


def _run(model: Any, inputs: dict[str, Tensor]) -> None:
    try:
        model(**inputs)
    except _StopForwardError:
        return
    raise AssertionError("the decoder has no first layer")
