"""ATP (arXiv 2412.14426): a decision generator and LoRA are trained in turns, and the last decision is the cut.

Before each of the first steps the generator's loss is measured on rows of the training data with a mask that was drawn
with noise, and its gradient waits for the optimizer; then LoRA takes its step under the decision without noise, with a
group lasso on what it has at removed indices. From the freeze on the mask stays and LoRA is trained alone.

Different from the authors' code, so that the result is a stock model: key-value groups take the place of parts of
heads, and every layer keeps as many indices, those of the largest logits. The generator begins with the choices of
`--choose` (`random` begins with none). The noise is logistic, in the generator's training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import AXES, FFN, KV_GROUPS
from pat_serve.cut.cuts import Cuts, line_name
from pat_serve.errors import UsageError
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.terminal.progress import say
from pat_serve.training.groups import GENERATOR
from pat_serve.training.method_settings import OwnSettings
from pat_serve.training.methods.atp.generator import (
    DecisionGenerator,
    budget_loss,
    generator_rate,
    noisy_mask,
    top_mask,
)
from pat_serve.training.methods.atp.masks import GroupMasks
from pat_serve.training.methods.atp.settings import AtpSettings
from pat_serve.training.methods.cut import Cut
from pat_serve.training.model.group_scores import members
from pat_serve.training.model.passes import summed_loss
from pat_serve.training.ranks import sharded_by_fsdp

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.training.config import TrainRecipe

BUDGET_WEIGHT = 5.0
# The Trainer clips one norm over all gradients, and Adam divides by their size anyway: so small, the generator's leave
# LoRA's alone.
GRADIENT_NORM = 1e-2


class Atp(Cut):
    """Pruning and tuning at once, for a domain whose rows say what stays."""

    name: ClassVar[str] = "atp"
    axes: ClassVar[frozenset[str]] = frozenset({FFN, KV_GROUPS})
    cuts_at_the_end: ClassVar[bool] = True
    settings: ClassVar[type[OwnSettings]] = AtpSettings
    # A refit belongs to a cut that stands before the first step.
    unused: ClassVar[frozenset[str]] = Cut.unused | {"compensate", "refit", "refit_shrinkage", "train"}
    why_unused: ClassVar[str] = "decides over FFN channels and groups alone, while it trains"
    defaults: ClassVar[Mapping[str, Any]] = {"compensate": False}

    @classmethod
    def check_base(cls, recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
        """Refuse sharded weights."""
        if sharded_by_fsdp():
            raise UsageError(
                f"--method {cls.name}",
                expected="one process, or DDP: the generator looks at the model between two steps",
                found="FSDP",
                fix="Choose configs/ddp.yaml, or another method.",
            )

    @classmethod
    def least_steps(cls, recipe: TrainRecipe) -> int:
        """One to decide, and one under the last decision."""
        return 2

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Add the generator, and mask every linear of an index."""
        self.model = model
        self.own = AtpSettings.of(self.recipe)
        self.counts = {
            axis: AXES[axis].length(self.target)
            for axis in sorted(self.axes)
            if AXES[axis].length(self.target) < AXES[axis].length(self.base)
        }
        lengths = {axis: AXES[axis].length(self.base) for axis in self.counts}
        self.generator = DecisionGenerator(num_layers, lengths)
        model.add_module(GENERATOR, self.generator)
        self.masks = GroupMasks(model, self.family, self.base, self.counts)
        self.rows: Sequence[dict[str, Tensor]] = ()
        self.frozen = False
        self._budget = 0.0

    def modules(self) -> dict[str, nn.Module]:
        """The generator."""
        return {GENERATOR: self.generator}

    def learning_rates(self) -> dict[str, float]:
        """The generator's own, which no scheduler changes."""
        return {GENERATOR: self.own.generator_learning_rate or generator_rate(self.control_steps)}

    @property
    def control_steps(self) -> int:
        """Steps in which the generator is trained."""
        return max(1, min(self.total_steps - 1, round(self.own.control_share * self.total_steps)))

    def unfinished(self) -> str | None:
        """Name the freeze while it is still to come."""
        return None if self.frozen else f"the masks' freeze at step {self.control_steps}"

    def begin(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Start from what was chosen; the generator learns on these rows."""
        self.rows = batches
        self.generator.start_from({axis: self._chosen_mask(axis) for axis in self.counts})
        self._decide()

    def _chosen_mask(self, axis: str) -> Tensor:
        mask_LI = torch.zeros(self.base.layers, AXES[axis].length(self.base))
        for layer in range(self.base.layers):
            mask_LI[layer, self.chosen[line_name(axis, layer)].kept] = 1.0
        return mask_LI

    def on_step(self, step: int) -> None:
        """Measure the generator's gradient, and decide; at the freeze, decide for good."""
        super().on_step(step)
        if not self.rows or self.frozen:
            return
        controls = step < self.control_steps
        if controls:
            self._measure(self.rows[step % len(self.rows)])
        self._decide()
        self.masks.leaks = controls
        if not controls:
            self._freeze()

    @torch.no_grad()
    def _decide(self) -> None:
        self.masks.values = {axis: top_mask(logits, self.counts[axis]) for axis, logits in self.generator().items()}

    def _measure(self, batch: dict[str, Tensor]) -> None:
        """Leave the gradient of the generator's loss where the optimizer finds it."""
        noise = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + self.step) % 2**63)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.enable_grad():
                drawn = {
                    axis: noisy_mask(logits, self.counts[axis], noise) for axis, logits in self.generator().items()
                }
                self.masks.values, self.masks.leaks = {axis: mask for axis, (mask, _) in drawn.items()}, False
                labelled = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
                budget = budget_loss({axis: soft for axis, (_, soft) in drawn.items()}, self.counts, self._weights())
                loss = summed_loss(self.model, batch) / max(1, labelled) + BUDGET_WEIGHT * budget
                trained = [parameter for parameter in self.generator.parameters() if parameter.requires_grad]
                gradients = torch.autograd.grad(loss, trained)
        finally:
            self.model.train(was_training)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1e-12)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient * (GRADIENT_NORM / norm)
        self._budget = float(budget.detach())

    def _weights(self) -> dict[str, int]:
        """Weights of one index of each axis, over all linears of a layer."""
        found = dict.fromkeys(self.counts, 0)
        for _, spec, layer in members(self.family, self.base, self.counts):
            if layer == 0:
                outputs, inputs = spec.shape("weight", self.base)
                for dim, other in zip(spec.dims, (inputs, outputs), strict=True):
                    for piece in dim:
                        if piece.axis in found:
                            found[piece.axis] += piece.block(self.base) * other
        return found

    def _freeze(self) -> None:
        self.frozen = True
        for parameter in self.generator.parameters():
            parameter.grad = None
        before = {line: cut.kept for line, cut in self.chosen.items()}
        kept = {
            line_name(axis, layer): torch.nonzero(mask_I).flatten().cpu()
            for axis, mask_LI in self.masks.values.items()
            for layer, mask_I in enumerate(mask_LI)
        }
        moved = sum(len(set(kept[line].tolist()) - set(indices.tolist())) for line, indices in before.items())
        self.chosen = Cuts.of(self.base, kept)
        total = sum(len(indices) for indices in kept.values())
        say(f"masks frozen at step {self.step}: {moved:,} of {total:,} kept indices differ from those of the start")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts nothing is masked."""
        values, self.masks.values = self.masks.values, {}
        try:
            yield
        finally:
            self.masks.values = values

    def losses(self) -> dict[str, Tensor]:
        """The group lasso, while decisions can change."""
        if self.frozen or not self.masks.values or not self.own.lasso_weight:
            return {}
        return {"group_lasso": self.own.lasso_weight * self.masks.lasso()}

    def metrics(self) -> dict[str, float]:
        """Distance of the sigmoids from the budget, |log(r / p)|, while the generator learns."""
        return {} if self.frozen else {"budget_gap": self._budget}
