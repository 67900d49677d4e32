"""PAT with a mask for every residual writer instead of one for all: what the unified mask costs. For the study alone.

Such a model is no narrower: its stream is the union of what the writers keep. So it is exported at the base's width
with rows of zeros, and, for a stock model of the pruned width, aligned again to one common set of channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.cuts import AxisCut, Cuts
from pat_serve.cut.hybrid import HybridFold
from pat_serve.families.family import Family
from pat_serve.run.plan import PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.base import Method
from pat_serve.training.methods.pat.hsm import HybridModule, SharedMask
from pat_serve.training.methods.pat.losses import count_loss, push_loss
from pat_serve.training.methods.pat.method import Pat

# A writer that keeps nothing would be another experiment.
LEAST_WIDTH = 8


class SeparateMasks(Pat):
    """PAT with a mask a writer; the subclasses say how wide each is.

    Attributes:
        scores: of each writer's channels, by its dotted name; to be set before a run.
        profile: one mask by all writers' scores together; or one a writer, of even or uneven widths of the same mean.
        aligns: after half of the steps all masks become the one that most writers agree on.
    """

    name: ClassVar[str] = "pat-mask-per-writer"
    profile: ClassVar[Literal["one", "even", "uneven"]] = "even"
    aligns: ClassVar[bool] = False
    scores: ClassVar[Mapping[str, Tensor]] = {}

    @classmethod
    def stays_wide(cls, recipe: TrainRecipe) -> str | None:
        """Always: what one writer cuts another may keep."""
        return super().stays_wide(recipe) or "its writers keep channels of their own"

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """The shared mask is there for its schedule and is never applied."""
        self.masks: dict[str, SharedMask] = {}
        self.aligned = False
        super().attach(model, num_layers)
        self.mask.logits_D.requires_grad_(False)

    def make_hsm(self, site: str, rank: int) -> HybridModule:
        """An HSM on a mask of its own."""
        widths = self.widths()
        mask = SharedMask(self.hidden_size, widths.get(site, self.target_width), self.mask.schedule)
        if self.recipe.mask_start != "zero":
            total_D = torch.stack(list(self.scores.values())).sum(0)
            mask.start_from(total_D if self.profile == "one" else self.scores[site])
        self.masks[site] = mask
        hsm = HybridModule(self.hidden_size, rank, mask)
        # Where the optimizer and the device's move find it.
        hsm.add_module("own_mask", mask)
        return hsm

    def widths(self) -> dict[str, int]:
        """The kept width K of each writer."""
        if self.profile != "uneven" or not self.scores:
            return dict.fromkeys(self.scores, self.target_width)
        # The trainer counts parameters on the meta device before it builds the model.
        with torch.device("cpu"):
            return uneven_widths(self.scores, self.target_width)

    def modules(self) -> dict[str, nn.Module]:
        """The hybrid modules and the masks, which have a learning rate of their own."""
        return {**{f"mask.{site}": mask for site, mask in self.masks.items()}, **self.hsms}

    def learning_rates(self) -> dict[str, float]:
        """Give each mask the unified mask's learning rate."""
        [rate] = super().learning_rates().values()
        return {f"mask.{site}": rate for site in self.masks}

    def on_step(self, step: int) -> None:
        """Move every gate along the one schedule."""
        Method.on_step(self, step)
        for mask in (self.mask, *self.masks.values()):
            mask.set_step(step)
        if self.aligns and not self.aligned and self.mask.frozen and step >= self.total_steps // 2:
            self.aligned = True
            kept = common_channels([mask.frozen_gate_D for mask in self.masks.values()], self.target_width, self.scores)
            for mask in self.masks.values():
                mask.frozen_gate_D.zero_().index_fill_(0, kept.to(mask.frozen_gate_D.device), 1.0)
        for mask in self.masks.values():
            mask.require_open()

    def losses(self) -> dict[str, Tensor]:
        """Give each mask the losses that the one mask would have."""
        terms = {name: term for name, term in super().losses().items() if name == "identity_loss"}
        if not self.mask.frozen and self.mask.schedule.trains_mask:
            masks = self.masks.values()
            terms["count_loss"] = torch.stack([count_loss(each.logits_D, each.target_width) for each in masks]).sum()
            terms["push_loss"] = torch.stack([push_loss(each.logits_D) for each in masks]).sum()
        return terms

    def metrics(self) -> dict[str, float]:
        """Figures of the gate, as means over the masks."""
        each = [mask.metrics() for mask in self.masks.values()]
        figures = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        if self.mask.frozen and self.mask.schedule.trains_mask:
            figures["gate_freeze_gap"] = sum(mask.freeze_gap for mask in self.masks.values()) / len(self.masks)
        return figures

    def kept_channels(self) -> Tensor:
        """Channels of the stream: all that any writer keeps."""
        gates_WD = torch.stack([mask.frozen_gate_D for mask in self.masks.values()])
        return gates_WD.amax(0).nonzero().flatten().cpu()

    def cuts(self) -> Cuts:
        """The whole axis, unless the masks are all the same."""
        kept = self.kept_channels()
        whole = torch.arange(self.hidden_size)
        kept = kept if len(kept) == self.target_width else whole
        return Cuts({HIDDEN: AxisCut(width=self.hidden_size, kept=kept)})

    def folds(self) -> dict[str, HybridFold]:
        """Each operator with its own gate in its scale."""
        return {
            site: replace(fold, scale_D=fold.scale_D * self.masks[site].frozen_gate_D.cpu())
            for site, fold in super().folds().items()
        }


class OneMask(SeparateMasks):
    """The unified mask by the writers' scores: what the others are to be compared with."""

    name: ClassVar[str] = "pat-one-mask"
    profile = "one"


class UnevenMasks(SeparateMasks):
    """Wide where the scores are high, narrow elsewhere."""

    name: ClassVar[str] = "pat-uneven-masks"
    profile = "uneven"


class AlignedMasks(SeparateMasks):
    """A mask a writer for half of the steps, one for all after that."""

    name: ClassVar[str] = "pat-aligned-masks"
    aligns = True


def uneven_widths(scores: Mapping[str, Tensor], mean_width: int) -> dict[str, int]:
    """Widths of the given mean: whatever channels score highest, of all writers together."""
    best_first = {site: torch.sort(score_D, descending=True).values for site, score_D in scores.items()}
    rest = torch.cat([score_D[LEAST_WIDTH:] for score_D in best_first.values()])
    owner = torch.cat([torch.full((len(s) - LEAST_WIDTH,), i) for i, s in enumerate(best_first.values())])
    chosen = torch.sort(rest, descending=True, stable=True).indices[: len(scores) * (mean_width - LEAST_WIDTH)]
    counts = torch.bincount(owner[chosen], minlength=len(scores))
    return {site: LEAST_WIDTH + int(count) for site, count in zip(scores, counts, strict=True)}


def common_channels(gates: list[Tensor], width: int, scores: Mapping[str, Tensor]) -> Tensor:
    """int64 (K,): the channels that most writers keep, ascending; of equal votes the one with more of the score."""
    votes_D = torch.stack([(gate_D != 0).double().cpu() for gate_D in gates]).sum(0)
    total_D = torch.stack(list(scores.values())).sum(0)
    order = torch.sort(votes_D + total_D / total_D.sum().clamp(min=1e-300) / 2, descending=True, stable=True).indices
    return order[:width].sort().values


def align(run: Path, aligned: Path, width: int, scores: Mapping[str, Tensor]) -> None:
    """Write a finished run of separate masks again, as one whose plan keeps one common set; nothing is trained.

    A channel that a writer had closed stays closed: it was trained that way.

    Args:
        run: of `SeparateMasks`.
        aligned: the new run's folder; replaced.
        width: K of the common set.
        scores: as in the run.
    """
    plan = PruningPlan.load(run)
    kept = common_channels([fold.scale_D for fold in plan.folds.values()], width, scores)
    cuts = Cuts({HIDDEN: AxisCut(width=plan.cuts[HIDDEN].width, kept=kept)})
    folds = dict(plan.folds.items())
    shutil.rmtree(aligned, ignore_errors=True)
    shutil.copytree(run, aligned)
    replace(plan, cuts=cuts, folds=folds).save(aligned)


def writer_scores(
    model: Any, family: Family, num_layers: int, batches: list[dict[str, Tensor]], rotation_DD: Tensor | None
) -> dict[str, Tensor]:
    """By residual writer, how much each channel of its output matters: float64 (D,), in the rotated stream.

    To first order the loss changes by -o_c g_c when channel c of a token's output o is set to zero, g being the loss's
    gradient there; the score is the sum of its squares over the tokens.

    Args:
        model: the base, as loaded: not rotated.
        family: its architecture.
        num_layers: of the base.
        batches: input_ids, attention_mask and labels.
        rotation_DD: Q that the run will turn the stream by; None where it stays as it is.
    """
    turn = torch.eye(model.config.hidden_size) if rotation_DD is None else rotation_DD.float()
    scores = {
        site: torch.zeros(model.config.hidden_size, dtype=torch.float64) for site in family.residual_writers(num_layers)
    }

    def listen(site: str, output_BTD: Tensor) -> None:
        if not output_BTD.requires_grad:
            output_BTD.requires_grad_()
        turned_BTD = output_BTD.detach().float() @ turn

        def add(gradient_BTD: Tensor) -> None:
            changes_BTD = turned_BTD * (gradient_BTD.float() @ turn)
            scores[site] += changes_BTD.double().square().sum((0, 1))

        output_BTD.register_hook(add)

    model.requires_grad_(False).eval()
    handles = [
        model.get_submodule(site).register_forward_hook(lambda _m, _i, output, site=site: listen(site, output))
        for site in scores
    ]
    for batch in batches:
        model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return scores
