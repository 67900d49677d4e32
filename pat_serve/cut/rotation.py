"""A rotation of the residual stream that changes the weights and not the function, as pure maths.

RMSNorm without a gain commutes with an orthogonal Q, so once every norm's gain is folded into the linears that read it,
one global Q can be folded into the weights: the embedding becomes E Q, a reader (W diag(gamma)) Q, a writer Q^T W, and
the gains become one. With the principal axes of the stream as Q, the channels that carry least can be cut. The idea is
SliceGPT's (arXiv 2401.15024), whose Q differs from block to block and needs matrices on the shortcuts; one Q does not.

Shape suffixes: D hidden_size, V vocabulary, O outputs of a reader, N inputs of a writer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.families.architectures import FINAL_NORM, HEAD
from pat_serve.families.family import Family, TensorSpec

# At most so many rows or columns of a weight are changed at once in a wider dtype.
ROWS_AT_ONCE = 4096


def principal_axes(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the stream's covariance, the strongest first.

    Args:
        covariance_DD: float64, sum over tokens of x x^T, each token divided by its RMS.

    Returns:
        rotation (D, D) float64, orthogonal, axes in columns, each with its largest entry positive so that the same
        covariance gives the same signs everywhere; and the axes' shares of the energy (D,) float64, which sum to 1.
    """
    energies_D, axes_DD = torch.linalg.eigh(covariance_DD)
    energies_D, axes_DD = energies_D.flip(0).clamp(min=0), axes_DD.flip(1)
    peaks_D = axes_DD.gather(0, axes_DD.abs().argmax(0, keepdim=True))[0]
    return axes_DD * peaks_D.sign(), energies_D / energies_D.sum()


def rotate_tensor(
    tensor: Tensor, spec: TensorSpec, family: Family, rotation_DD: Tensor, gain_D: Tensor | None
) -> Tensor:
    """One tensor of the rotated model.

    Args:
        tensor: weight or bias, in the dtype to compute in.
        spec: its line in the architecture table.
        family: says how norms store their gain.
        rotation_DD: Q, in the tensor's dtype.
        gain_D: the effective gain of the norm that feeds a reader's weight; None for everything else.

    Returns:
        the rotated tensor, in the same dtype.
    """
    if spec.hidden_norm:
        # The gain is in the readers now; what is stored means a gain of one.
        return torch.full_like(tensor, 1.0 - family.norm_offset)
    if spec.hidden_dimension == 0:
        return rotation_DD.T @ tensor
    if tensor.dim() == 2 and spec.hidden_dimension == 1:
        return (tensor if gain_D is None else tensor * gain_D) @ rotation_DD
    return tensor


def effective_gain(stored_D: Tensor, family: Family) -> Tensor:
    """The gain that a norm multiplies by: the stored weight, plus one on Gemma."""
    return stored_D + family.norm_offset


@torch.no_grad()
def rotate_model(model: Any, family: Family, num_layers: int, rotation_DD: Tensor, *, keeps_tie: bool = False) -> None:
    """Rotate a loaded model in place; its function stays the same.

    Args:
        model: a causal language model of transformers, without adapters.
        family: its architecture.
        num_layers: of the model.
        rotation_DD: Q (D, D), in any float dtype. Products run in float32, or float64 for a float64 model.
        keeps_tie: a tied head stays tied. The last norm then keeps its gain, which the caller sets, and the function
            is the same only if that gain commutes with Q. By default a tied head is untied.
    """
    left = {HEAD, FINAL_NORM} if keeps_tie else set()
    if not keeps_tie:
        untie_head(model)
    named = {
        name: (model.get_submodule(name), spec, i) for name, spec, i in family.modules(num_layers) if name not in left
    }
    gains = {
        name: effective_gain(module.weight, family).clone()
        for name, (module, spec, _) in named.items()
        if spec.hidden_norm
    }
    for module, spec, i in named.values():
        for kind, parameter in module.named_parameters(recurse=False):
            compute = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            gain_D = gains[spec.norm.format(i=i)].to(compute) if spec.norm and kind == "weight" else None
            rotation = rotation_DD.to(parameter.device, compute)
            # A whole 16-bit head would be held three times in float32, so it goes in pieces along the other axis.
            across = int(spec.hidden_dimension == 0)
            for piece in parameter.split(ROWS_AT_ONCE, dim=across) if parameter.dim() == 2 else [parameter]:
                piece.copy_(rotate_tensor(piece.to(compute), spec, family, rotation, gain_D))


def untie_head(model: Any) -> None:
    """Give a tied model a head of its own, equal to its embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
