"""Everything that decides what a training run does: one flat recipe, in YAML and as flags alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from pat_serve.checkpoints.locate import absolute
from pat_serve.cut.axes import FFN, LAYERS
from pat_serve.errors import UsageError
from pat_serve.training.agreement import disagreements, refuse_unused
from pat_serve.training.groups import check_groups, parse_scales, untrained_group
from pat_serve.training.method_settings import MethodSettings
from pat_serve.training.methods.pat.settings import PatSettings
from pat_serve.training.model.least_squares import SHRINKAGE
from pat_serve.training.presets import FORMER_CALIBRATION_ROWS, UNPRUNED
from pat_serve.training.rates import default_rate
from pat_serve.training.recipe_errors import recipe_error
from pat_serve.training.recipe_file import write_recipe
from pat_serve.training.shape_settings import ShapeSettings

TENSORBOARD: Literal["tensorboard"] = "tensorboard"

# The schedulers of transformers that need no arguments of their own and no metric.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip

LEAST_CALIBRATION_ROWS = 8
# Where the ratio of a tied base goes, from so many layers on.
AXES_OF_TIED = (LAYERS, FFN)
LEAST_LAYERS = 8


class TrainRecipe(MethodSettings, ShapeSettings, PatSettings):
    """Settings of a run; the defaults are what measured best (docs/ablation.md, docs/study.md), or else the paper's.

    `run/recipe.yaml` holds every value that the method has a use for. So
    `pat-train --config run/recipe.yaml --out again/` repeats a run.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    revision: str | None = None
    data: str
    data_split: str = "train"
    streaming: bool = False
    packing: bool = False
    skip_bad_rows: bool = False
    eval_data: str | None = None
    eval_split: str = "validation"
    eval_share: float | None = pydantic.Field(default=None, gt=0, lt=1)
    eval_steps: int = pydantic.Field(default=100, ge=1)
    method: str = "pat"
    ratio: float | None = None
    hidden_size: int | None = None
    # Look for the best shape of that ratio for about so long, before the run (search/).
    search_minutes: float = pydantic.Field(default=0.0, ge=0)
    # Shapes that decode so many times as fast, in the ratio's place (batch 1, 128 tokens): by a search, or by a rule.
    speedup: float | None = pydantic.Field(default=None, gt=1)
    # With 0, the cut is made up for and nothing is trained.
    max_steps: int | None = pydantic.Field(default=None, ge=0)
    epochs: float = pydantic.Field(default=3.0, gt=0)
    batch_size: int = pydantic.Field(default=8, ge=1)
    # By the rows that there are (checks/steps.py), where none is named.
    gradient_accumulation_steps: int | None = pydantic.Field(default=None, ge=1)
    max_length_tokens: int = pydantic.Field(default=256, ge=8)
    # By the width of the base (rates.py), where none is named.
    learning_rate: float | None = pydantic.Field(default=None, gt=0)
    # Factors by group of parameters (groups.py).
    lr_scale: dict[str, Annotated[float, pydantic.Field(gt=0)]] = pydantic.Field(default_factory=dict)
    lr_scheduler: str = "cosine"
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    quantize_base: Literal["nf4"] | None = None
    skip_preflight: bool = False

    # The trained parameters: LoRA on every linear, or weights themselves (weights.py).
    train: Literal["lora", "head+last3", "all"] = "lora"
    lora_rank: int = pydantic.Field(default=20, ge=1)
    # The rank, where nothing else is said.
    lora_alpha: float = pydantic.Field(default=20.0, gt=0)
    lora_dropout: float = pydantic.Field(default=0.05, ge=0, lt=1)

    compensate: bool | None = None
    # Where that goes: whole in the place of the weights, or into LoRA's start.
    refit: Literal["auto", "lora", "full"] = "auto"
    # How firmly the refit holds weights where they are while its tokens are few; 0 not at all (model/least_squares.py).
    refit_shrinkage: float = pydantic.Field(default=SHRINKAGE, ge=0)
    # Rows that the stream is measured on, before the first step; the export's parity prompts are the first 8.
    # Where the recipe names no number, the rows' tokens decide (data/calibration_samples.py).
    calibration_rows: int | None = pydantic.Field(default=None, ge=LEAST_CALIBRATION_ROWS)
    lora_head: bool | None = None
    # Share of the loss that is KL to the dense base; 1 leaves the cross-entropy out.
    distillation_weight: float = pydantic.Field(default=0.0, ge=0, le=1)
    # The gains of the norms over the residual stream too (norms.py).
    train_norms: bool = False
    # Train on the kept channels alone where the cut stands before the first step (narrow.py).
    narrow: Literal["auto", "off"] = "auto"

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = (TENSORBOARD,)
    logging_steps: int = pydantic.Field(default=10, ge=1)
    save_steps: int = pydantic.Field(default=500, ge=1)
    keep_checkpoints: int = pydantic.Field(default=2, ge=1)

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> TrainRecipe:
        for reason in disagreements(self):
            raise ValueError(reason)
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, settings: object) -> object:
        """Let alpha follow the rank, so that a larger rank does not come with a smaller scale."""
        if isinstance(settings, dict) and settings.get("lora_rank") is not None:
            return {"lora_alpha": settings["lora_rank"], **settings}
        return settings

    @pydantic.field_validator("report_to", mode="before")
    @classmethod
    def _split_names(cls, names: object) -> object:
        """Split the names, which a flag gives as one text; `none` is nobody."""
        if not isinstance(names, str):
            return names
        return tuple(name.strip() for name in names.split(",") if name.strip() not in ("", "none"))

    @pydantic.field_validator("lr_scale", mode="before")
    @classmethod
    def _split_scales(cls, scales: object) -> object:
        """Parse the factors, which flags give as texts."""
        return parse_scales(scales)

    @pydantic.field_validator("lr_scale")
    @classmethod
    def _known_groups(cls, scales: dict[str, float]) -> dict[str, float]:
        check_groups(scales)
        return scales

    @pydantic.field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        if name not in SCHEDULERS:
            raise ValueError(f"one of {', '.join(SCHEDULERS)}")
        return name

    def with_absolute_paths(self) -> TrainRecipe:
        """The same recipe with local paths made absolute, so that a run can be resumed from any folder."""
        named = {name: getattr(self, name) for name in ("model", "data", "eval_data")}
        return self.model_copy(update={name: absolute(path) for name, path in named.items() if path is not None})

    def with_axes(self, *, tied: bool, layers: int) -> TrainRecipe:
        """The recipe with the axes of its ratio named, where the settings say nothing of what is cut.

        A tied base loses layers and FFN channels, which keeps more of it than a narrower stream of the same size
        (docs/study.md). Any setting of PAT's own asks for the stream.

        Args:
            tied: the base's head is its embedding.
            layers: of the base; one of few layers has none to spare.
        """
        of_the_stream = {"method", "narrow", "lora_head", *PatSettings.model_fields} & self.model_fields_set
        says = self.shape or self.axes or self.hidden_size is not None or of_the_stream
        if says or not tied or layers < LEAST_LAYERS:
            return self
        settings = self.model_dump(exclude_unset=True)
        return TrainRecipe.build({**settings, "axes": AXES_OF_TIED}, "recipe")

    def with_rate(self, hidden_size: int) -> TrainRecipe:
        """The recipe with a learning rate, of its own or by the width of the base, where its method trains."""
        from pat_serve.training.methods import METHODS

        if self.learning_rate is not None or "learning_rate" in METHODS[self.method].unused:
            return self
        return self.model_copy(update={"learning_rate": default_rate(hidden_size, self.train)})

    def resolved(self, *, tied: bool, prunes: bool = True, narrows: bool = True) -> TrainRecipe:
        """The recipe with every `auto` of the method decided by what measured best (docs/ablation.md).

        Args:
            tied: the base's head is its embedding. A rotation leaves them tied where the cut stands from the start and
                is compensated, which fits the last norm's gain.
            prunes: the method does; for one that does not there is nothing to decide.
            narrows: it cuts the stream; for one that does not there are no axes, no mask and no gate.

        Raises:
            UsageError: what was chosen by hand does not go with what follows from the rest.
        """
        refuse_unused(self)
        if not prunes:
            self._refuse_untrained_groups(lora_head=bool(self.lora_head), prunes=False)
            settled = {"lora_head": bool(self.lora_head), "train_norms": self.trains_norms}
            return self.model_copy(update=UNPRUNED | settled)
        if not narrows:
            self._refuse_untrained_groups(lora_head=bool(self.lora_head), prunes=False)
            compensate = self.compensate is None or self.compensate
            whole = {
                "rotate": "none",
                "mask_start": "energy",
                "gate": "cut",
                "lora_head": bool(self.lora_head),
                "compensate": compensate,
                "refit": self._resolved_refit(compensate),
                "train_norms": self.trains_norms,
            }
            return self.model_copy(update=whole)
        gate = self.gate
        if gate == "auto":
            # Undecided means that the training decides; a 4-bit base cannot be compensated, nor was a gradient's choice
            # measured with it.
            trains = self.mask_start in ("zero", "gradient") or self.quantize_base
            gate = "anneal" if trains else "cut"
        compensate = gate == "cut" and not self.quantize_base if self.compensate is None else self.compensate
        can_keep_tie = gate == "cut" and compensate and not self.lora_head
        rotate = self.rotate
        if rotate == "auto":
            # An undecided mask throws strong principal axes away.
            stays = self.mask_start in ("gradient", "zero")
            stays = stays or (tied and self.tied_embeddings == "keep" and not can_keep_tie)
            # Nothing trained, the energy's axes keep more (LOG.md, 2026-11-30); trained, the loss's (docs/ablation.md).
            axes: Literal["energy", "loss"] = "energy" if self.max_steps == 0 else "loss"
            rotate = "none" if stays or self.quantize_base else axes
        tie = self.tied_embeddings
        if tied and tie == "auto" and rotate != "none":
            tie = "keep" if can_keep_tie else "untie"
        own_head = rotate != "none" and not (tied and tie == "keep")
        chosen = {
            "rotate": rotate,
            "tied_embeddings": tie,
            "mask_start": "energy" if self.mask_start == "auto" else self.mask_start,
            "gate": gate,
            "compensate": compensate,
            "lora_head": own_head and self.train == "lora" if self.lora_head is None else self.lora_head,
            "train_norms": self.trains_norms,
        }
        refit = {"refit": self._resolved_refit(bool(chosen["compensate"]))}
        self._refuse_untrained_groups(lora_head=bool(chosen["lora_head"]), prunes=True)
        unused = rotate == "none" and chosen["mask_start"] == "zero" and not chosen["compensate"]
        if unused and self.asks_for_rows:
            raise UsageError(
                "--calibration-rows",
                expected="a recipe that measures the stream (--rotate, --mask-start energy, --compensate)",
                found=f"{self.calibration_rows} and a mask that starts undecided",
                fix="Leave it out.",
            )
        return TrainRecipe.build(self.model_dump() | chosen | refit, "recipe")

    @property
    def asks_for_rows(self) -> bool:
        """Somebody chose the number of calibration rows: it is neither the default nor the former one."""
        return self.calibration_rows not in (None, FORMER_CALIBRATION_ROWS)

    @property
    def trains_norms(self) -> bool:
        """The gains of the stream's norms are trained, as they are where all weights are."""
        return self.train_norms or self.train == "all"

    @property
    def keeps_tie(self) -> bool:
        """The head of a tied base stays tied under the rotation; of a resolved recipe."""
        settled = self.gate == "cut" and bool(self.compensate)
        return self.rotate in ("energy", "loss") and self.tied_embeddings == "keep" and settled

    def _resolved_refit(self, compensate: bool) -> str:
        """New weights, where a cut is made up for."""
        return "full" if self.refit == "auto" and compensate else self.refit

    def _refuse_untrained_groups(self, *, lora_head: bool, prunes: bool) -> None:
        has_lora = self.train == "lora"
        found = untrained_group(
            self.lr_scale, lora=has_lora, head=lora_head or not has_lora, prunes=prunes, norms=self.trains_norms
        )
        if found is not None:
            raise UsageError("--lr-scale", expected="groups that are trained", found=found[0], fix=found[1])

    def resolved_warmup_steps(self, total_steps: int) -> int:
        """The paper's 100 steps, or a tenth of a run that is shorter than 1,000."""
        return self.warmup_steps if self.warmup_steps is not None else min(100, total_steps // 10)

    def save(self, run: Path) -> None:
        """Write recipe.yaml, complete or not at all."""
        from pat_serve.training.methods import METHODS

        # A field that the method has no use for is left out, unless a preset has given it a value.
        set_to = self.model_dump(exclude_defaults=True)
        settings = self.model_dump(mode="json", exclude=set(METHODS[self.method].unused - set_to.keys()))
        # The run's own first, then the shape's and the method's.
        inherited = ShapeSettings.model_fields | PatSettings.model_fields | MethodSettings.model_fields
        write_recipe(run, {name: settings[name] for name in sorted(settings, key=inherited.__contains__)})

    @staticmethod
    def build(settings: dict[str, Any], source: str) -> TrainRecipe:
        """Check settings from a file or from flags.

        Raises:
            UsageError: a setting is missing, unknown or out of range.
        """
        try:
            return TrainRecipe.model_validate(settings)
        except pydantic.ValidationError as error:
            raise recipe_error(error, source, TrainRecipe.model_fields) from error
