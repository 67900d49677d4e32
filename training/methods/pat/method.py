"""PAT as published (arXiv 2408.14721), on unmodified transformers and peft.

An HSM follows the embedding and every o_proj and down_proj, as a forward hook: everything that enters the residual
stream has the same channels at zero, RMSNorm keeps a zero a zero, and so those channels can be cut afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.cuts import Cuts
from pat_serve.cut.hybrid import HybridFold
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.terminal.progress import say
from pat_serve.training.methods.base import Method
from pat_serve.training.methods.pat.hsm import HybridModule, SharedMask
from pat_serve.training.methods.pat.losses import count_loss, identity_loss, push_loss
from pat_serve.training.methods.pat.schedule import GateSchedule, least_steps
from pat_serve.training.model.slicing import placed, scatter
from pat_serve.training.ranks import snapshot, whole

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe

MASK = "mask"
# Above this the projection at the freeze changes what the model computes noticeably.
UNDECIDED_GAP = 0.1


class Pat(Method):
    """Pruning-aware tuning of the hidden dimension."""

    name: ClassVar[str] = "pat"
    follows_writers: ClassVar[bool] = True

    @classmethod
    def wants_calibration(cls, recipe: TrainRecipe) -> bool:
        """Rotation and the energy start do."""
        return recipe.rotate != "none" or recipe.mask_start != "zero"

    @classmethod
    def wants_batches(cls, recipe: TrainRecipe) -> bool:
        """Whether the calibration or a choice along another axis reads batches."""
        return cls.wants_calibration(recipe) or bool(recipe.inner_axes)

    @classmethod
    def stays_wide(cls, recipe: TrainRecipe) -> str | None:
        """The cut must stand before the first step, and nothing may look at what goes."""
        reasons = {
            "the gate closes while it trains": recipe.gate != "cut",
            "its operators mix channels before some of them go": bool(recipe.hio_rank),
            "a 4-bit base cannot be cut": recipe.quantize_base is not None,
            "--narrow off": recipe.narrow == "off",
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @classmethod
    def least_steps(cls, recipe: TrainRecipe) -> int:
        """The steps in which the gate closes."""
        return least_steps(recipe.gate)

    def unfinished(self) -> str | None:
        """Name the mask's freeze while it is still to come."""
        return None if self.mask.frozen else f"the mask's freeze at step {self.mask.schedule.freeze_step}"

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Put an HSM behind every residual writer."""
        assert self.recipe.gate != "auto", "the recipe was not resolved"
        schedule = GateSchedule.for_run(self.total_steps, self.recipe.milestone_share, self.recipe.gate)
        self.mask = SharedMask(self.hidden_size, self.target_width, schedule)
        if self.recipe.mask_start != "zero":
            assert self.calibration is not None
            self.mask.start_from(self.calibration.importance_D)
        self.hsms: dict[str, HybridModule] = {}
        # The mask goes where no layer owns it; each HSM goes under its writer, so that whatever shards or checkpoints
        # a layer takes the layer's HSMs along.
        model.add_module("pat_mask", self.mask)
        rank = self.recipe.resolved_hio_rank(self.hidden_size)
        kept_tied = {EMBEDDING} if self.recipe.tied_embeddings != "untie" and _tied(model) else set()
        for site in self.family.residual_writers(num_layers):
            writer = model.get_submodule(site)
            hsm = self.make_hsm(site, 0 if site in kept_tied else rank)
            writer.add_module("hsm", hsm)
            writer.register_forward_hook(_run_hsm)
            self.hsms[site] = hsm

    def make_hsm(self, site: str, rank: int) -> HybridModule:
        """The HSM behind one residual writer; what studies another kind of operator or of mask overrides this."""
        return HybridModule(self.hidden_size, rank, self.mask)

    def modules(self) -> dict[str, nn.Module]:
        """The mask and every HSM."""
        return {MASK: self.mask, **self.hsms}

    def learning_rates(self) -> dict[str, float]:
        """The mask's own, scaled to the run's length unless the recipe names one."""
        rate = self.recipe.mask_learning_rate
        return {MASK: self.mask.schedule.mask_learning_rate() if rate is None else rate}

    def set_total_steps(self, total_steps: int) -> None:
        """Stretch the gate's schedule to this many steps."""
        super().set_total_steps(total_steps)
        self.mask.schedule = GateSchedule.for_run(total_steps, self.recipe.milestone_share, self.mask.schedule.kind)

    def on_step(self, step: int) -> None:
        """Move the gate along its schedule; at the freeze, project it to exactly K channels."""
        super().on_step(step)
        was_frozen = self.mask.frozen
        self.mask.set_step(step)
        for hsm in self.hsms.values():
            if not hsm.operator().rank:
                hsm.bound_scale()
        if self.mask.frozen and not was_frozen and self.mask.schedule.trains_mask:
            say(
                f"mask frozen at step {step}: {self.target_width} of {self.hidden_size} channels; the projection moved "
                f"the gate by {self.mask.freeze_gap:.3f} on average (0: fully polarised, 0.5: undecided)"
            )
            if self.mask.freeze_gap > UNDECIDED_GAP:
                say(
                    f"warning: the mask had not decided before its freeze ({self.mask.freeze_gap:.3f} > "
                    f"{UNDECIDED_GAP}), and the model feels the cut as a jump: train longer (--max-steps, --epochs) or "
                    "raise --mask-learning-rate"
                )
        self.mask.require_open()

    def follow(self, cuts: Cuts) -> None:
        """Every HSM scales the kept channels, those of dropped layers go; the mask stays as it is, for the plan."""
        super().follow(cuts)
        stay = {name for name, _, _ in placed(self)}
        self.hsms = {site: hsm for site, hsm in self.hsms.items() if site in stay}
        if HIDDEN in cuts:
            for hsm in self.hsms.values():
                hsm.narrow(cuts[HIDDEN].kept)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Every HSM hands its input on."""
        assert self.sliced_by.is_identity, "the dense model is gone"
        for hsm in self.hsms.values():
            hsm.enabled = False
        try:
            yield
        finally:
            for hsm in self.hsms.values():
                hsm.enabled = True

    def losses(self) -> dict[str, Tensor]:
        """Mask losses while the mask moves; the weighted identity loss over all HSMs throughout."""
        factors = [whole(hsm.orthonormal()) for hsm in self.hsms.values() if len(hsm.l0_RD)]
        weight = self.recipe.identity_weight
        terms = {"identity_loss": weight * identity_loss(factors)} if factors and weight else {}
        if not self.mask.frozen and self.mask.schedule.trains_mask:
            logits_D = whole(self.mask.logits_D)
            terms["count_loss"] = count_loss(logits_D, self.target_width)
            terms["push_loss"] = push_loss(logits_D)
        return terms

    def metrics(self) -> dict[str, float]:
        """Figures of the gate, and the gap at its freeze once it is frozen."""
        figures = self.mask.metrics()
        if self.mask.frozen and self.mask.schedule.trains_mask:
            figures["gate_freeze_gap"] = self.mask.freeze_gap
        return figures

    def kept_channels(self) -> Tensor:
        """The K channels with the largest logits."""
        return self.mask.kept_indices()

    def histograms(self) -> dict[str, Tensor]:
        """The gate and the logits behind it; all ranks must ask."""
        return {"gate": self.mask.gate().detach().cpu(), "mask_logits": snapshot(self.mask.logits_D)}

    def cuts(self) -> Cuts:
        """The K channels that the mask keeps, and what was chosen of other axes."""
        assert self.mask.frozen
        return super().cuts()

    def folds(self) -> dict[str, HybridFold]:
        """Every HSM's operator; all ranks must ask, since each may hold a shard."""
        return {
            site: HybridFold(
                l0_RD=self._wide(hsm.l0_RD, 1), l1_DR=self._wide(hsm.l1_DR, 0), scale_D=self._wide(hsm.scale_D, 0, 1.0)
            )
            for site, hsm in self.hsms.items()
        }

    def _wide(self, parameter: Tensor, dimension: int, fill: float = 0.0) -> Tensor:
        """A parameter of an HSM over all of the base's channels, with its starting value where the model was cut."""
        whole_D = snapshot(parameter)
        if HIDDEN not in self.sliced_by:
            return whole_D
        return scatter(whole_D, self.sliced_by[HIDDEN].kept, self.hidden_size, dimension, fill)


def _tied(model: nn.Module) -> bool:
    """The head's weight is the embedding's."""
    return model.get_submodule(EMBEDDING).weight is model.get_submodule(HEAD).weight


def _run_hsm(writer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    gated: Tensor = writer.get_submodule("hsm")(output)
    return gated
