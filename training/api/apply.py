"""From a loaded model to one that a stock Trainer tunes and prunes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.checkpoints.locate import absolute
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import UsageError
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.training.api.applied import AppliedPat, frozen_hashes
from pat_serve.training.api.callback import add_losses
from pat_serve.training.checks.base_weights import require_same_weights
from pat_serve.training.checks.cut_report import report_cut
from pat_serve.training.checks.width import check_ties, target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import Calibration, calibrate, calibration_batches
from pat_serve.training.model.norms import hidden_norms
from pat_serve.training.model.ready import make_ready
from pat_serve.training.presets import preset_settings

CALIBRATION_BATCH = 8
# Any number that every schedule can be made for: they are stretched once the Trainer knows its steps.
SOME_STEPS = 24


@dataclass(frozen=True, kw_only=True)
class PatConfig:
    """Settings of `apply_pat`: those of `pat-train` with the same names.

    Attributes:
        preset: "default" (as None is), or "paper" for PAT as published. A setting that is None
            is as the preset has it.
        ratio: share of all parameters to cut, in (0, 0.6]; 0.25 when neither this, hidden_size nor shape is given.
        axes: where the ratio cuts (hidden, layers, ffn, kv_groups); the stream alone by default.
        hidden_size: width to end with, instead of a ratio.
        shape: counts to end with by axis (hidden, layers, ffn, kv_groups), instead of either.
        choose: what chooses them, by axis, where it is not the default.
        lora_rank: of the adapter.
        lora_alpha: of the adapter; its rank by default.
        lora_dropout: of the adapter.
        lora_head: adapt the head too.
        hio_rank: of the hybrid operators; "auto" by the rule of thumb (`docs/study_toys.md`).
        rotate: "none", or the axes to turn the residual stream to: "energy", "loss".
        mask_start: what the mask starts from: "zero", "energy", "gradient".
        gate: how it closes: "anneal", "gradual", "cut".
        compensate: make up for the cut before the first step.
        refit: where that goes: "full", into the weights, or "lora", into the adapter's start.
        refit_shrinkage: how firmly it holds weights where they are while the examples are few.
        tied_embeddings: "keep" or "untie", where the base ties them.
        train_norms: train the gains of the norms over the residual stream too.
        narrow: "auto" trains the kept channels alone where the cut stands before the first step; "off" all of them.
        milestone_share: share of the run after which an annealed gate would be hard.
        mask_learning_rate: 0.5 / milestone by default.
        lr_scale: factors of the Trainer's learning rate by group: "lora_a", "lora_b", "head", "hsm", "norms".
        base: where the model's files are, if not where `from_pretrained` found them.
        revision: of the base on the hub; the loaded one's by default.
        recipe: the former name of `preset`.
    """

    preset: Literal["default", "paper"] | None = None
    ratio: float | None = None
    axes: Sequence[str] | None = None
    hidden_size: int | None = None
    shape: Mapping[str, int] | None = None
    choose: Mapping[str, str] | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_head: bool | None = None
    hio_rank: int | Literal["auto"] | None = None
    rotate: str | None = None
    mask_start: str | None = None
    gate: str | None = None
    compensate: bool | None = None
    refit: str | None = None
    refit_shrinkage: float | None = None
    tied_embeddings: str | None = None
    train_norms: bool | None = None
    narrow: str | None = None
    milestone_share: float | None = None
    mask_learning_rate: float | None = None
    lr_scale: Mapping[str, float] | None = None
    base: str | None = None
    revision: str | None = None
    recipe: Literal["default", "paper"] | None = None


def apply_pat(
    model: Any, config: PatConfig | None = None, *, calibration: Iterable[Mapping[str, Any]] | None = None
) -> Any:
    """Add LoRA and the HSMs to a loaded model, turned to its principal axes if the recipe says so; the base is frozen.

    Args:
        model: from `AutoModelForCausalLM.from_pretrained`; its files must still be there, the export starts from them.
            Its weights are changed in place: rotated, and cut down to the kept channels, as the recipe says.
        config: the settings.
        calibration: about 128 examples of the training data, as the Trainer gets them: `input_ids`, and `labels` if
            they differ. The default preset measures the stream on them; the paper's needs none.

    Returns:
        the PEFT model, with an `AppliedPat` as its attribute `pat`. Its config keeps the base's hidden_size, whatever
        it is trained at: `save_run` writes for that.

    Raises:
        PatServeError: the model's files are not found, are of no known family or hold other weights, the width is
            illegal, or the recipe wants examples and there are none.
    """
    settings = {name: value for name, value in asdict(config or PatConfig()).items() if value is not None}
    source = str(settings.pop("base", model.config._name_or_path))
    revision = settings.pop("revision", getattr(model.config, "_commit_hash", None))
    source = absolute(source)
    named = settings.pop("preset", None), settings.pop("recipe", None)
    chosen = preset_settings(*named, option="PatConfig.preset") | settings
    recipe = TrainRecipe.build(
        {"model": source, "revision": revision, "data": "passed to a Trainer", **chosen}, "PatConfig"
    )
    checkpoint = open_checkpoint(source, recipe.revision)
    chosen_method = method_of(recipe)
    recipe = recipe.resolved(tied=checkpoint.tied, narrows=HIDDEN in chosen_method.axes)
    check_ties(recipe, checkpoint)
    require_same_weights(model, checkpoint)
    shape = target_shape(recipe, checkpoint)
    report_cut(recipe, checkpoint, shape)
    examples = [_example(entry) for entry in calibration or ()]
    vocabulary = Vocabulary(rows=checkpoint.sizes.vocab, rowless={})
    vocabulary.require((token_id for example in examples for token_id in example["input_ids"]), "calibration")
    batches = calibration_batches(examples, CALIBRATION_BATCH)
    if not batches and chosen_method.wants_batches(recipe):
        raise UsageError(
            "calibration",
            expected="some examples of the training data, to measure the residual stream on",
            found="none",
            fix='apply_pat(model, config, calibration=examples[:128]); PatConfig(preset="paper") needs none.',
        )
    measured = _measure(model, checkpoint, recipe, batches) if chosen_method.wants_calibration(recipe) else None
    ready = make_ready(model, checkpoint.family, recipe, shape, SOME_STEPS, calibration=measured, batches=batches)
    adapted: Any = ready.model
    method = ready.method
    gains: frozenset[str] = frozenset()
    if recipe.train_norms:
        gains = frozenset(f"{name}.weight" for _, name, _ in hidden_norms(adapted, method))
    adapted.pat = AppliedPat(
        method=method,
        recipe=recipe,
        checkpoint=checkpoint,
        replaced=ready.replaced,
        frozen_sha256=frozen_hashes(adapted.get_base_model(), gains),
    )
    adapted.register_forward_hook(add_losses, with_kwargs=True)
    return adapted


def _measure(model: Any, checkpoint: Checkpoint, recipe: TrainRecipe, batches: list[dict[str, Any]]) -> Calibration:
    rotate, by_gradient = recipe.rotate, recipe.mask_start == "gradient"
    assert rotate != "auto", "the recipe was not resolved"
    return calibrate(
        model,
        checkpoint.family,
        checkpoint.num_layers,
        batches,
        rotate=rotate,
        by_gradient=by_gradient,
        keeps_tie=recipe.keeps_tie,
    )


def _example(entry: Mapping[str, Any]) -> dict[str, list[int]]:
    ids = [int(token) for token in entry["input_ids"]]
    seen = [int(bit) for bit in entry.get("attention_mask", [1] * len(ids))]
    return {"input_ids": ids, "attention_mask": seen, "labels": [int(label) for label in entry.get("labels", ids)]}
