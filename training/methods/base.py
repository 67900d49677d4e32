"""The interface of a training method: modules that it adds, losses that they want, and the plan that they leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.cut.cuts import AxisCut, Cuts
from pat_serve.cut.hybrid import HybridFold
from pat_serve.families.architectures import FINAL_NORM
from pat_serve.families.family import Family
from pat_serve.run.plan import BaseReference, PruningPlan
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.method_settings import OwnSettings
from pat_serve.training.model.calibration import Calibration

if TYPE_CHECKING:
    from pat_serve.checkpoints.checkpoint import Checkpoint
    from pat_serve.training.config import TrainRecipe


class Method(ABC):
    """One run's method. LoRA is already in the model when a method is attached; a method adds what else it trains.

    Args:
        recipe: the run's settings.
        family: the base's architecture.
        base: sizes of the base.
        target: sizes to end with (the base's for a method that does not prune).
        total_steps: optimizer steps of the whole run.
    """

    name: ClassVar[str]
    prunes: ClassVar[bool] = True
    # There are optimizer steps; a method without any has a lifecycle of its own.
    trains: ClassVar[bool] = True
    # LoRA is put on the linears, and an adapter leaves the run.
    adapts: ClassVar[bool] = True
    # The settings that no other method has.
    settings: ClassVar[type[OwnSettings]] = OwnSettings
    # Settings of all recipes that it has no use for: its help leaves them out, and a run that gives one is refused.
    unused: ClassVar[frozenset[str]] = frozenset()
    why_unused: ClassVar[str] = ""
    # Settings of all recipes that it has other defaults for; with a lora_rank comes its lora_alpha.
    defaults: ClassVar[Mapping[str, Any]] = {}
    # The axes that its cuts may go along.
    axes: ClassVar[frozenset[str]] = frozenset(AXES)
    # The method chooses counts and indices of all axes but the stream's (`choose`), near the asked size.
    searches: ClassVar[bool] = False
    # The axes that it cuts where neither a shape nor a ratio is given (`default_shape`).
    cut_by_default: ClassVar[frozenset[str]] = frozenset()
    # The choice along an axis, where it is not the axis' own default.
    choices: ClassVar[Mapping[str, str]] = {}
    # Cuts of other axes than the stream's stand after the last step alone, so the model keeps its size until then.
    cuts_at_the_end: ClassVar[bool] = False
    # An operator follows every module that writes to the residual stream, and keeps its input for the backward pass.
    follows_writers: ClassVar[bool] = False

    def __init__(
        self, recipe: TrainRecipe, family: Family, base: ModelSizes, target: ModelSizes, total_steps: int
    ) -> None:
        self.recipe = recipe
        self.family = family
        self.base = base
        self.target = target
        self.total_steps = total_steps
        self.step = 0
        # Set before `attach` when the method wants one.
        self.calibration: Calibration | None = None
        # The base's last gain (D,) of a model that was turned and stays tied; the turned one has another.
        self.dense_gain_D: Tensor | None = None
        # The cuts of other axes than the method's own, chosen before the first step.
        self.chosen = Cuts()
        # The cuts that the model in memory already has; none while it is as large as the base.
        self.sliced_by = Cuts()

    @property
    def hidden_size(self) -> int:
        """Width D of the base's residual stream."""
        return self.base.hidden

    @property
    def target_width(self) -> int:
        """K, the width to end with."""
        return self.target.hidden

    @classmethod
    def wants_calibration(cls, recipe: TrainRecipe) -> bool:
        """The recipe asks for something that is measured on the base before the first step."""
        return False

    @classmethod
    def wants_batches(cls, recipe: TrainRecipe) -> bool:
        """Rows of the training data are looked at before the first step: to measure, to choose or to compensate."""
        return cls.wants_calibration(recipe)

    @classmethod
    def check_base(cls, recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
        """Look whether the method can work on a base, before anything else is read.

        Args:
            recipe: the run's settings.
            checkpoint: the base.

        Raises:
            UsageError: it cannot.
        """
        return

    @classmethod
    def default_shape(cls, sizes: ModelSizes) -> dict[str, int]:
        """Counts to end with, by axis, where neither a shape nor a ratio is given; empty where one must be.

        Args:
            sizes: of the base.
        """
        return {}

    @classmethod
    def choose(
        cls,
        recipe: TrainRecipe,
        base: Any,
        family: Family,
        shape: Mapping[str, int],
        batches: Sequence[dict[str, Tensor]],
        folder: Path | None = None,
    ) -> dict[str, Tensor]:
        """Choose what stays, for a method that searches.

        Args:
            recipe: the run's settings, resolved.
            base: the causal language model as it is stored; left as it was.
            family: its architecture.
            shape: counts that were asked for, by axis.
            batches: rows of the training data, padded: input_ids, attention_mask and labels.
            folder: the run's, laid out, for what an interrupted search need not do again; None keeps nothing.

        Returns:
            int64 indices that stay, ascending, by line of a plan; no line of an axis that stays whole.
        """
        raise NotImplementedError(cls.name)

    @classmethod
    def stays_wide(cls, recipe: TrainRecipe) -> str | None:
        """Why the model keeps its full width while it trains; None if it can be cut down before the first step.

        Args:
            recipe: the run's settings, resolved.
        """
        return "nothing is cut"

    @classmethod
    def least_steps(cls, recipe: TrainRecipe) -> int:
        """Optimizer steps that a run has at least, for the method to come to its end."""
        return 1

    def unfinished(self) -> str | None:
        """Name the event that the steps so far have not reached and a plan needs; None if there can be a plan."""
        return None

    @abstractmethod
    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Add the method's modules to the model (the one inside peft's wrapper)."""

    def begin(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Everything is chosen and made up for, and nothing cut yet.

        Args:
            batches: rows of the training data, padded: input_ids, attention_mask and labels.
        """
        return

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The added modules by name: their state is saved in every checkpoint, their parameters are trained."""

    def learning_rates(self) -> dict[str, float]:
        """Learning rates that differ from the recipe's, by a module's name."""
        return {}

    def set_total_steps(self, total_steps: int) -> None:
        """Stretch the schedules over another number of steps; before the first, for loops that learn it late."""
        self.total_steps = total_steps

    def follow(self, cuts: Cuts) -> None:
        """The model has been cut down to what these keep: follow with the method's modules (see model/slicing.py)."""
        self.sliced_by = cuts

    def on_step(self, step: int) -> None:
        """Called before every optimizer step with its number, from 0, also after a resume."""
        self.step = step

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts the model computes as if the method's modules were not there."""
        yield

    def losses(self) -> dict[str, Tensor]:
        """Scalars to be added to the cross-entropy in training, never in evaluation."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Figures of the method's own for a line of metrics.jsonl, by name."""
        return {}

    def kept_channels(self) -> Tensor | None:
        """int64 (K,): the channels of the stream that stay, ascending, as far as is known; None if all do."""
        return None

    def histograms(self) -> dict[str, Tensor]:
        """Distributions for TensorBoard, by name."""
        return {}

    def plan(self, base: BaseReference) -> PruningPlan:
        """The plan after the last step, without the adapter's hashes; all ranks must ask."""
        last_gain_D = None if self.calibration is None else self.calibration.last_gain_D
        return PruningPlan(
            method=self.name,
            base=base,
            cuts=self.cuts(),
            folds=self.folds(),
            rotation=self.rotation(),
            tied=last_gain_D is not None,
            norms={} if last_gain_D is None else {FINAL_NORM: last_gain_D},
        )

    def merged(self, stored: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that take the place of the base's after the last step, by name.

        Args:
            stored: gives a tensor of the base as its files have it.
        """
        return iter(())

    def cuts(self) -> Cuts:
        """The plan's: the channels that stay, and what was chosen of other axes."""
        kept = self.kept_channels()
        kept = torch.arange(self.base.hidden) if kept is None else kept
        return Cuts({HIDDEN: AxisCut(width=self.base.hidden, kept=kept), **self.chosen})

    def rotation(self) -> Tensor | None:
        """The rotation (D, D) of the residual stream that the folds and cuts refer to."""
        return None if self.calibration is None else self.calibration.rotation_DD

    def folds(self) -> dict[str, HybridFold]:
        """The plan's operators after the last step."""
        return {}
