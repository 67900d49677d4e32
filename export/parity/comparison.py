"""The parity gate's findings: one comparison, and all of them with a verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pat_serve.errors import ParityError
from pat_serve.export.parity.figures import Figures, Tolerance
from pat_serve.export.parity.greedy import GreedyContinuation

TRAINED, EXACT, RANDOM, EXPORTED = "trained", "exported, not rounded", "exported, rounded at random", "exported"
TRANSFORMERS, VLLM = "transformers", "vllm"

# The error of the logits at a typical position, beside that of a random rounding: 0.7 to 1.3 where nothing is lost
# (docs/parity.md). A stochastic rounding, whose numbers move twice as far in the square, is expected at 1.4 or less.
LOSSY_PROPORTION = 1.5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model against the trained one in float32 (float64 for float64 files, and where float32 cannot tell).

    Attributes:
        model: which: TRAINED (the same one, in a narrower dtype), EXACT (what was rounded to the files), RANDOM (the
            same, every number moved at random by as much as a rounding), EXPORTED (the files).
        runtime: TRANSFORMERS or VLLM.
        dtype: dtype in which the model computes.
        figures: the distance from the trained model.
        greedy: comparison of greedy continuations; None where none were asked for.
        tolerance: limits of the figures; None where the figures are for information.
        yardstick: the model whose figures the tolerance is a multiple of; None for a tolerance that is fixed.
    """

    model: str
    runtime: str
    dtype: str
    figures: Figures
    greedy: GreedyContinuation | None
    tolerance: Tolerance | None
    yardstick: str | None = None

    @property
    def passed(self) -> bool:
        """The figures are within the tolerance."""
        if self.tolerance is None:
            return True
        return self.figures.within(self.tolerance) and (self.greedy is None or self.greedy.passed)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as pat_export.json has it."""
        return asdict(self) | {"passed": self.passed}

    def expected(self) -> str:
        """The limits that the comparison is held to, in words."""
        assert self.tolerance is not None
        limit = self.tolerance
        parts = [f"a mean KL up to {limit.mean_kl_nats:.3g} nats"]
        if limit.max_abs_over_std is not None:
            parts = [f"logits within {limit.max_abs_over_std:.3g} of their standard deviation", *parts]
        if limit.median_kl_nats is not None:
            parts.append(f"a median one up to {limit.median_kl_nats:.3g}")
        if limit.top1_agreement is not None:
            parts.append(f"{limit.top1_agreement:.1%} equal greedy tokens")
        if self.greedy and self.greedy.allowed_gap_over_std is not None:
            parts.append("equal greedy texts")
        of = "" if self.yardstick is None else f", in proportion to {self.yardstick}"
        return f"{', '.join(parts)} ({self.model}, {self.runtime} in {self.dtype}{of})"

    def found(self) -> str:
        """The figures that were found, in words."""
        if not self.figures.finite:
            return "numbers that are not finite"
        figures, greedy = self.figures, self.greedy
        parts = [
            f"{figures.max_abs_over_std:.3g} of the deviation",
            f"{figures.mean_kl_nats:.3g} nats on average and {figures.median_kl_nats:.3g} in the median",
            f"{figures.top1_agreement:.1%} equal tokens",
        ]
        if greedy is not None:
            gap = f"the widest gap {greedy.widest_gap_over_std:.3g}"
            parts.append(f"{greedy.equal} of {greedy.prompts} equal texts, {gap}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The outcome of all comparisons of an export.

    Attributes:
        dtype: dtype of the files.
        prompts: number of prompts.
        layerwise: the models were walked through layer by layer.
        headline: the files, in transformers, computed in float32 (or float64).
        comparisons: all comparisons, in order.
        notes: facts about this model that a reader of the figures needs.
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
        """The headline's largest difference over the deviation."""
        return self.headline.max_abs_over_std

    @property
    def logits_std(self) -> float:
        """The deviation of the trained model's logits."""
        return self.headline.logits_std

    def as_dict(self) -> dict[str, Any]:
        """The outcome as pat_export.json has it."""
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "prompts": self.prompts,
            "layerwise": self.layerwise,
            **asdict(self.headline),
            "notes": list(self.notes),
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
        }

    def require(self, out: Path, *, another: str, rounded: str) -> None:
        """Raise unless passed.

        Args:
            out: the export that was to be proved.
            another: way out where the files are another function.
            rounded: way out where the function is right and rounding changes it too much; the dtype is added.

        Raises:
            ParityError: with the figures that are out of tolerance.
        """
        for failed in (comparison for comparison in self.comparisons if not comparison.passed):
            fix = another if failed.yardstick is None else f"{rounded} {self._way_out(failed)}"
            raise ParityError(out, expected=failed.expected(), found=failed.found(), fix=fix)

    def _way_out(self, failed: Comparison) -> str:
        if failed.runtime == VLLM:
            return "In transformers the files passed: another version of vLLM may compute them better, or leave it out."
        wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(self.dtype, "float64")
        return f"The rewriting itself was proved, the rounding is at fault: use --dtype {wider}."


def loses_updates(files: Comparison, random: Comparison) -> bool:
    """The files are further from the trained model than a harmless rounding: what was trained is among the loss.

    Nearest values lose an update that is smaller than half a step, all over the model and to the same side.

    Args:
        files: the files of nearest values, in float32.
        random: the rewriting, rounded at random.
    """
    return not files.passed or files.figures.median_kl_nats > LOSSY_PROPORTION**2 * random.figures.median_kl_nats
