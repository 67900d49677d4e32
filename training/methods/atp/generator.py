"""The decision generator: from a fixed code of each layer to a logit of each FFN channel and key-value group.

Shape suffixes: L layers, C code size, I indices of an axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CODE_SIZE, ATTENTION_HEADS, CODE_LAYERS, CODE_FFN = 64, 4, 2, 256
TEMPERATURE = 0.4
# The logit that an index starts with: above zero where the choice before the first step keeps it, else below. The
# authors start all indices at 3, since their budget is met on the way; here the counts hold from the first step.
START = 2.0


# The authors' learning rate, for the thousands of steps of their epochs.
LEAST_RATE = 1e-3
# The mean magnitude of a normalised state's entries.
_STATE = 0.8


def generator_rate(deciding_steps: int) -> float:
    """A learning rate by which an index whose gradient keeps its sign changes sides in a quarter of the steps.

    Adam moves each of an index's CODE_SIZE weights by about the rate in a step, and so its logit by CODE_SIZE * _STATE
    times the rate; START is its way to zero, where an index that moves the other way meets it.

    Args:
        deciding_steps: of the generator.

    Returns:
        the rate; the authors' at least.
    """
    return max(LEAST_RATE, START / (CODE_SIZE * _STATE * max(1.0, deciding_steps / 4)))


class DecisionGenerator(nn.Module):
    """Codes, an encoder in which the layers see each other, and a linear of its own for each layer and axis.

    Args:
        num_layers: L.
        lengths: I by axis.
    """

    def __init__(self, num_layers: int, lengths: Mapping[str, int]) -> None:
        super().__init__()
        self.codes_LC = nn.Parameter(torch.empty(num_layers, CODE_SIZE), requires_grad=False)
        layer = nn.TransformerEncoderLayer(CODE_SIZE, ATTENTION_HEADS, CODE_FFN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, CODE_LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(CODE_SIZE)
        self.heads_LIC = nn.ParameterDict(
            {axis: nn.Parameter(torch.empty(num_layers, length, CODE_SIZE)) for axis, length in lengths.items()}
        )
        self.starts_LI = nn.ParameterDict(
            {
                axis: nn.Parameter(torch.zeros(num_layers, length), requires_grad=False)
                for axis, length in lengths.items()
            }
        )
        nn.init.orthogonal_(self.codes_LC)
        for head_LIC in self.heads_LIC.values():
            # The first decisions are those of the start.
            nn.init.zeros_(head_LIC)

    def start_from(self, kept: Mapping[str, Tensor]) -> None:
        """Begin with a choice.

        Args:
            kept: 0 or 1 of each index (L, I), by axis.
        """
        for axis, kept_LI in kept.items():
            self.starts_LI[axis].data.copy_(START * (2 * kept_LI - 1))

    def forward(self) -> dict[str, Tensor]:
        """Logits (L, I) by axis."""
        states_LC = self.norm(self.encoder(self.codes_LC[None])[0])
        return {
            axis: torch.einsum("lc,lic->li", states_LC, head_LIC) + self.starts_LI[axis]
            for axis, head_LIC in self.heads_LIC.items()
        }


def top_mask(logits_LI: Tensor, count: int) -> Tensor:
    """1 for the `count` largest logits of each layer, else 0, (L, I)."""
    kept_LK = logits_LI.topk(count, dim=1).indices
    return torch.zeros_like(logits_LI).scatter_(1, kept_LK, 1.0)


def noisy_mask(logits_LI: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A mask that was drawn with logistic noise: the values of `top_mask`, and the gradient of a sigmoid.

    Args:
        logits_LI: of the generator.
        count: of indices that each layer keeps.
        generator: of the noise, on the CPU.

    Returns:
        the mask, and the sigmoid itself, both (L, I).
    """
    uniform_LI = torch.rand(logits_LI.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits_LI.device)
    noisy_LI = logits_LI + torch.logit(uniform_LI)
    soft_LI = torch.sigmoid(noisy_LI / TEMPERATURE)
    return top_mask(noisy_LI.detach(), count) + soft_LI - soft_LI.detach(), soft_LI


def budget_loss(soft: Mapping[str, Tensor], counts: Mapping[str, int], weights: Mapping[str, int]) -> Tensor:
    """log(max(r, p) / min(r, p)): r is the share of the weights that stay by the sigmoids, p the one that shall.

    Args:
        soft: (L, I) by axis.
        counts: of indices that each layer shall keep, by axis.
        weights: of an index of an axis.
    """
    stays = sum(weights[axis] * soft_LI.sum() for axis, soft_LI in soft.items())
    shall = sum(weights[axis] * counts[axis] * len(soft_LI) for axis, soft_LI in soft.items())
    assert isinstance(stays, Tensor)
    return torch.log(stays / shall).abs()
