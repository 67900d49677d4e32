"""Start the adapter where it makes up for the cut: least squares on calibration data, layer by layer.

With x the normalised input of a reader in the dense model and z the kept channels of the same input in the cut one, the
best linear guess of x is B z, B = E[x z^T] E[z z^T]^-1, whatever the reader; so W should become W B. The difference
W B - W[:, K] is given to the reader's LoRA factors, at their rank, by the singular values that matter to z. The base's
weights stay as they are: the plan, the export and the dense teacher know nothing of it.

The layers are walked in order, each on inputs that have passed the compensated layers before it, as one-shot pruning
does (arXiv 2410.15567 and its forerunners). Starting LoRA from a decomposition is LoftQ's idea (arXiv 2310.08659),
which makes up for quantization with it.

Shape suffixes: N tokens, D hidden_size, K kept channels, O outputs of a reader, R rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.architectures import Family
from pat_serve.progress import track
from pat_serve.rotation import ROWS_AT_ONCE
from pat_serve.training.methods.base import Method

# Of the mean diagonal of E[z z^T]: calibration data are few, and channels nearly dependent.
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What a decoder layer is called with for one batch, in the dense and in the cut model."""

    dense_BTD: Tensor
    cut_BTD: Tensor
    settings: dict[str, Any]
    real_BT: Tensor


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
    entries = [_enter(model, base, method, batch) for batch in batches]
    readers: dict[str, list[str]] = {}
    for name, spec, i in family.modules(num_layers):
        if spec.norm is not None:
            readers.setdefault(spec.norm.format(i=i), []).append(name)
    norms = [name for name, spec, _ in family.modules(num_layers) if spec.hidden_norm]
    by_layer = [[name for name in norms if name.startswith(f"model.layers.{i}.")] for i in range(num_layers)]
    for i, sites in enumerate(track(by_layer, "compensate for the cut", num_layers)):
        layer = base.get_submodule(f"model.layers.{i}")
        for site in sites:
            norm, moments = base.get_submodule(site), _Moments(kept_K)
            for entry in entries:
                with model.disable_adapter(), method.disabled():
                    x_BTD = _output_of(norm, layer, entry.dense_BTD, entry.settings)
                z_BTD = _output_of(norm, layer, entry.cut_BTD, entry.settings)
                moments.add(x_BTD[entry.real_BT], z_BTD[entry.real_BT])
            _set_readers(base, readers[site], moments)
        for number, entry in enumerate(entries):
            # One after the other: both layers' states of all rows would be twice the memory.
            entries[number] = _advance(layer, model, method, entry)
    [last] = [name for name in norms if not name.startswith("model.layers.")]
    norm, moments = base.get_submodule(last), _Moments(kept_K)
    for entry in entries:
        moments.add(norm(entry.dense_BTD)[entry.real_BT], norm(entry.cut_BTD)[entry.real_BT])
    _set_readers(base, readers[last], moments)
    model.train(was_training)


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


def _set_readers(base: nn.Module, names: list[str], moments: _Moments) -> None:
    guess_DK, factor_KK = moments.solve()
    felt_DK = guess_DK @ factor_KK
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
    """Their product, summed in float64 and kept in float32, by rows: a head in float64 is larger than the model."""
    product_OK = torch.empty(len(weight_OD), felt_DK.shape[1], device=weight_OD.device)
    for at in range(0, len(weight_OD), ROWS_AT_ONCE):
        product_OK[at : at + ROWS_AT_ONCE] = weight_OD[at : at + ROWS_AT_ONCE].double() @ felt_DK
    return product_OK


class _StopForwardError(Exception):
    """The first layer has been reached."""


def _enter(model: Any, base: nn.Module, method: Method, batch: dict[str, Tensor]) -> _Entry:
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
        with model.disable_adapter(), method.disabled():
            _run(model, inputs)
        _run(model, inputs)
    finally:
        handle.remove()
    [(dense_BTD, settings), (cut_BTD, _)] = caught
    settings = {name: value for name, value in settings.items() if name != "hidden_states"}
    return _Entry(dense_BTD=dense_BTD, cut_BTD=cut_BTD, settings=settings, real_BT=inputs["attention_mask"].bool())


def _run(model: Any, inputs: dict[str, Tensor]) -> None:
    try:
        model(**inputs)
    except _StopForwardError:
        return
    raise AssertionError("the decoder has no first layer")


def _output_of(norm: nn.Module, layer: nn.Module, hidden_BTD: Tensor, settings: dict[str, Any]) -> Tensor:
    """What a norm inside a layer gives for the layer's input."""
    outputs: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        layer(hidden_BTD, **settings)
    finally:
        handle.remove()
    return outputs[0]


def _advance(layer: nn.Module, model: Any, method: Method, entry: _Entry) -> _Entry:
    with model.disable_adapter(), method.disabled():
        dense_BTD = _hidden(layer(entry.dense_BTD, **entry.settings))
    cut_BTD = _hidden(layer(entry.cut_BTD, **entry.settings))
    return _Entry(dense_BTD=dense_BTD, cut_BTD=cut_BTD, settings=entry.settings, real_BT=entry.real_BT)


def _hidden(output: Any) -> Tensor:
    hidden_BTD = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden_BTD, Tensor)
    return hidden_BTD
