"""The part of a speed-up check's record that is about whole models, extrapolated from several measured depths."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.depth import DepthFit
from pat_serve.server.analysis.noise import NoiseReport
from pat_serve.server.analysis.statistics import RatioInterval
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.speedup.grid import Regime


class Extrapolated(BaseModel):
    """One phase at one batch size, extrapolated to the models' own depths and not measured.

    Attributes:
        regime: the phase.
        batch_size: requests at once.
        prompt_tokens: of each request, where the check has a grid; None where all have the settings' length.
        claimed: the claim names it; else it is shown, and does not count for the check's verdict.
        context_tokens: as in the measured phase.
        layers_measured: the depths that the lines go through.
        baseline: the baseline's line, in seconds of the measured phase.
        candidate: the candidate's line.
        ratio: of the totals.
        ceiling: the largest ratio that counting FLOPs or bytes allows, for the whole models.
        of_ceiling: median ratio / ceiling.
        noise: the worst of the depths.
        rounds_needed: rounds of each depth that would probably give a verdict; None where no sensible number would.
        verdict: on the claim with its margin.
        strict_verdict: on the claim without it.
        reason: of the verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    regime: Regime
    batch_size: int
    context_tokens: float
    layers_measured: tuple[int, ...]
    baseline: DepthFit
    candidate: DepthFit
    ratio: RatioInterval
    ceiling: float
    of_ceiling: float
    noise: NoiseReport
    rounds_needed: int | None
    verdict: Verdict
    strict_verdict: Verdict
    reason: str
    prompt_tokens: int | None = None
    claimed: bool = True

    @property
    def layers(self) -> str:
        """Layers of the whole models: one number, or both where they differ."""
        baseline, candidate = self.baseline.layers, self.candidate.layers
        return str(baseline) if baseline == candidate else f"{baseline}/{candidate}"

    @property
    def name(self) -> str:
        """The name that tells this result from the check's other results."""
        batch = f"{'batch ' if self.prompt_tokens is None else ''}{self.batches}"
        return f"{self.regime.value}, {batch}, {self.layers} layers (extrapolated)"

    @property
    def batches(self) -> str:
        """The batch size, and in a grid with the length of the prompts: 8x1024."""
        return str(self.batch_size) if self.prompt_tokens is None else f"{self.batch_size}x{self.prompt_tokens}"
