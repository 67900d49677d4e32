"""The parity gate: is the exported model the trained one?

The trained model is the masked wide one (base + adapter + operators as hooks, cut channels at zero), computed in
float32. Held against it, on the run's own prompts and on random token ids: the exported files in stock transformers, in
float32 and in the dtype that they are meant to run in, and in vLLM where a scorer is given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pat_serve.architectures import HIDDEN
from pat_serve.errors import ParityError
from pat_serve.export.answers import Answers
from pat_serve.export.figures import TOLERANCES, Figures, GreedyContinuation, Tolerance, compare_greedy, compare_logits
from pat_serve.export.listed import compare_listed
from pat_serve.export.models import LoadedModels, Models, WalkedModels, must_walk
from pat_serve.export.prompts import WALKED_NEW_TOKENS, Prompts, parity_prompts
from pat_serve.export.reader import Run
from pat_serve.scores import Scorer, ScoreRequest

TRAINED, EXACT, EXPORTED = "trained", "exported, not rounded", "exported"
TRANSFORMERS, VLLM = "transformers", "vllm"
# vLLM's own kernels add in another order, and exponentials are approximated in some; docs/parity.md has measurements.
VLLM_TOLERANCE = Tolerance(max_abs_over_std=1e-3, mean_kl_nats=1e-6, top1_agreement=0.995)
# In 16 bits an export may be off by so many times what the trained model itself is off in the same arithmetic. A KL
# grows with the square of the logits' error.
OWN_DTYPE_FACTOR = 3.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model against the trained one in float32 (float64 for float64 files).

    Attributes:
        model: which: TRAINED (the same one, in 16 bits), EXACT (what was rounded to the files), EXPORTED (the files).
        runtime: TRANSFORMERS or VLLM.
        dtype: in which it computes.
        figures: the distance.
        greedy: of greedy continuations.
        tolerance: what it is held to; None where the figures are for information.
    """

    model: str
    runtime: str
    dtype: str
    figures: Figures
    greedy: GreedyContinuation
    tolerance: Tolerance | None

    @property
    def passed(self) -> bool:
        """Within tolerance."""
        return self.tolerance is None or (self.figures.within(self.tolerance) and self.greedy.passed)

    def as_dict(self) -> dict[str, Any]:
        """For pat_export.json."""
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Outcome of all comparisons; the first figures are those of the files computed in float32.

    Attributes:
        dtype: of the files.
        prompts: how many.
        layerwise: the models were walked through layer by layer.
        headline: the files, in transformers, computed in float32 (or float64).
        comparisons: all of them.
        notes: what a reader of the figures has to know about the family.
    """

    dtype: str
    prompts: int
    layerwise: bool
    headline: Figures
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Every comparison is within its tolerance."""
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def max_abs_over_std(self) -> float:
        """The headline's."""
        return self.headline.max_abs_over_std

    @property
    def logits_std(self) -> float:
        """The trained model's."""
        return self.headline.logits_std

    def as_dict(self) -> dict[str, Any]:
        """For pat_export.json."""
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "prompts": self.prompts,
            "layerwise": self.layerwise,
            **asdict(self.headline),
            "notes": list(self.notes),
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
        }

    def require(self, out: Path, fix: str) -> None:
        """Raise unless passed.

        Args:
            out: what was to be proved.
            fix: what follows.

        Raises:
            ParityError: with the figures that are out of tolerance.
        """
        for comparison in self.comparisons:
            if comparison.passed or comparison.tolerance is None:
                continue
            figures, limit, greedy = comparison.figures, comparison.tolerance, comparison.greedy
            raise ParityError(
                out,
                expected=(
                    f"logits within {limit.max_abs_over_std:.3g} of their standard deviation, KL "
                    f"{limit.mean_kl_nats:.3g} nats, {limit.top1_agreement:.1%} equal greedy tokens and equal greedy "
                    f"texts ({comparison.model}, {comparison.runtime} in {comparison.dtype})"
                ),
                found=(
                    f"{figures.max_abs_over_std:.3g}, {figures.mean_kl_nats:.3g} nats, {figures.top1_agreement:.1%}, "
                    f"{greedy.equal} of {greedy.prompts} equal texts, the widest gap {greedy.widest_gap_over_std:.3g}"
                ),
                fix=fix,
            )


def measure_parity(
    run: Run,
    folder: Path,
    target: torch.dtype,
    *,
    runs_in: torch.dtype | None = None,
    walk: bool | None = None,
    scorer: Scorer | None = None,
) -> Parity:
    """Compare the exported files with the trained model.

    The rewriting is held to float32's tolerance whatever the files' dtype: rounding to 16 bits hides a lost scale or an
    uncorrected eps. So for 16-bit files the rewriting is judged before it is rounded, too. When that fails, float64 is
    asked whether the rewriting is wrong or float32's own additions were.

    Args:
        run: the run that they come from.
        folder: with config.json and weights.
        target: dtype of the files.
        runs_in: dtype that the files were made to run in, which rounds the factor of a scaled embedding; `target` by
            default.
        walk: layer by layer; None decides by the memory that is there.
        scorer: asks vLLM.
    """
    measure = partial(_measure, run, folder, target, runs_in or target, walk, scorer)
    if target == torch.float64:
        return measure(torch.float64)
    parity = measure(torch.float32)
    first = parity.comparisons[0]
    if first.passed:
        return parity
    # In a wide or deep model the order of float32 additions alone can pass the limit. In float64 it is nothing,
    # while a rewriting that is wrong stays as wrong as it was.
    again = measure(torch.float64)
    note = (
        f"In float32 the logits differed by {first.figures.max_abs_over_std:.3g} of their standard deviation, above "
        "the limit: all models were computed again in float64."
    )
    return replace(again, notes=(*again.notes, note))


def _measure(
    run: Run,
    folder: Path,
    target: torch.dtype,
    runs_in: torch.dtype,
    walk: bool | None,
    scorer: Scorer | None,
    compute: torch.dtype,
) -> Parity:
    """`measure_parity` with the trained model and the rewriting computed in one dtype."""
    prompts = parity_prompts(run)
    walked = must_walk(run, prompts, compute) if walk is None else walk
    if walked:
        prompts = replace(prompts, new_tokens=WALKED_NEW_TOKENS)
    models: Models = (WalkedModels if walked else LoadedModels)(run, folder, runs_in)
    trained = models.trained(compute, prompts)
    comparisons: list[Comparison] = []
    rounded = target.itemsize < compute.itemsize
    files_tolerance = own_tolerance = TOLERANCES[target]
    if rounded:
        comparisons.append(_compare(EXACT, compute, trained, models.exact(compute, prompts), TOLERANCES[compute]))
        few = prompts.few()
        trained_few, prompts_few = trained.at(prompts.positions_of(few)), prompts.select(few)
        floor = _compare(TRAINED, target, trained_few, models.trained(target, prompts_few), None)
        own_tolerance = rounding_tolerance(floor.figures, TOLERANCES[target])
        if target == torch.float32:
            # Only a model whose float32 rounding passes the limit comes here, and its files are rounded alike.
            files_tolerance = own_tolerance = own_tolerance.or_wider(TOLERANCES[target])
    files = _compare(EXPORTED, compute, trained, models.exported(compute, prompts), files_tolerance)
    comparisons.append(files)
    if rounded:
        own = _compare(EXPORTED, target, trained_few, models.exported(target, prompts_few), own_tolerance)
        comparisons += [floor, own]
    if scorer is not None:
        # vLLM has no float64.
        ask = partial(_score, scorer, folder, prompts, trained, files.figures.logits_std)
        comparisons.append(ask(torch.float32, VLLM_TOLERANCE if target.itemsize >= 4 else TOLERANCES[target]))
        if target.itemsize == 2:
            comparisons.append(ask(target, own_tolerance))
    return Parity(
        dtype=_name(target),
        prompts=len(prompts.whole),
        layerwise=walked,
        headline=files.figures,
        comparisons=tuple(comparisons),
        notes=family_notes(run, runs_in),
    )


def rounding_tolerance(trained: Figures, files: Tolerance) -> Tolerance:
    """What an export may be off by when it computes in 16 bits.

    Args:
        trained: what the trained model is off by in the same arithmetic.
        files: the tolerance of such files computed in float32. Its share of equal tokens is always enough: of a hundred
            positions a near tie more or less is one percent, which says nothing about a model.
    """
    differing = OWN_DTYPE_FACTOR * (1 - trained.top1_agreement)
    return Tolerance(
        max_abs_over_std=OWN_DTYPE_FACTOR * trained.max_abs_over_std,
        mean_kl_nats=OWN_DTYPE_FACTOR**2 * trained.mean_kl_nats,
        top1_agreement=min(files.top1_agreement, 1 - differing),
    )


def _compare(
    model: str, dtype: torch.dtype, trained: Answers, other: Answers, tolerance: Tolerance | None
) -> Comparison:
    figures = compare_logits(trained.logits, other.logits)
    greedy = compare_greedy(
        trained.continuations,
        trained.continued_logits,
        other.continuations,
        logits_std=figures.logits_std,
        tolerance=tolerance,
    )
    return Comparison(
        model=model, runtime=TRANSFORMERS, dtype=_name(dtype), figures=figures, greedy=greedy, tolerance=tolerance
    )


def _score(
    scorer: Scorer,
    folder: Path,
    prompts: Prompts,
    trained: Answers,
    logits_std: float,
    dtype: torch.dtype,
    tolerance: Tolerance,
) -> Comparison:
    request = ScoreRequest(
        model=folder,
        dtype=_name(dtype),
        prompts=prompts.whole,
        continued=prompts.continued,
        new_tokens=prompts.new_tokens,
    )
    scores = scorer(request)
    figures = compare_listed(trained.logits, prompts.whole, scores.prompts, logits_std)
    greedy = compare_greedy(
        trained.continuations,
        trained.continued_logits,
        scores.continuations,
        logits_std=logits_std,
        tolerance=tolerance,
    )
    return Comparison(
        model=EXPORTED, runtime=VLLM, dtype=_name(dtype), figures=figures, greedy=greedy, tolerance=tolerance
    )


def family_notes(run: Run, runs_in: torch.dtype) -> tuple[str, ...]:
    """What is particular about the base's family, in sentences for the parity report."""
    cut = run.plan.axes[HIDDEN]
    notes = []
    if cut.is_identity:
        return ()
    if any(spec.head_norm for spec in run.base.family.tensors):
        notes.append(
            "The norms over q and k heads see the changed rms_norm_eps; q_proj and k_proj carry "
            f"sqrt({cut.width}/{len(cut.kept)}), which undoes it exactly."
        )
    if run.base.family.scaled_embedding:
        notes.append(
            f"The embedding is rescaled for sqrt(hidden_size) as {_name(runs_in)} rounds it; "
            "both models were compared with that."
        )
    return tuple(notes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
