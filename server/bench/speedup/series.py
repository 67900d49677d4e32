"""The rounds of a check: their number, their batch sizes, and the point at which they are enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pat_serve.server.analysis.precision import relative_width, rounds_for_width
from pat_serve.server.analysis.statistics import PairedRatio
from pat_serve.server.bench.speedup.analysis import analyse, average_ratio, rounds_of, surroundings_of
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import RegimeResult, Round, WarmUp
from pat_serve.server.bench.speedup.rounds import run_round, steps_per_turn
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.probe import MachineRates
from pat_serve.server.engine.workers.process import EngineProcess
from pat_serve.shapes.sizes import ModelSizes

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models, and the settings by which they are measured.

    Attributes:
        baseline: the dense shape.
        candidate: the candidate's shape.
        candidate_batch: the candidate's batch size, where it differs.
        settings: of the check.
        dtype_bytes: bytes of a weight.
        probes: of the machine; none without a roofline.
    """

    baseline: ModelSizes
    candidate: ModelSizes
    candidate_batch: int | None
    settings: SpeedupSettings
    dtype_bytes: int
    probes: Sequence[MachineRates] = ()

    def analyse(self, rounds: Sequence[Round], warm_ups: Sequence[WarmUp] = ()) -> tuple[RegimeResult, ...]:
        """Judge every regime at every batch size, from the rounds so far; only verdicts depend on the warm-ups."""
        surroundings = surroundings_of(rounds, warm_ups)
        return tuple(
            analyse(
                regime,
                rounds_of(rounds, cell),
                self.settings.with_cell(cell),
                baseline=self.baseline,
                candidate=self.candidate,
                candidate_batch=self.candidate_batch,
                dtype_bytes=self.dtype_bytes,
                surroundings=surroundings,
                probes=self.probes,
                in_grid=bool(self.settings.grid),
                claimed=self.settings.names(regime, cell),
            )
            for cell in self.settings.cells
            for regime in self.settings.regimes
        )

    def average(self, regimes: Sequence[RegimeResult]) -> PairedRatio | None:
        """The average prefill ratio over batch sizes; None where there are not several, and over a grid."""
        if self.settings.grid:
            return None
        prefills = [result for result in regimes if result.regime is Regime.PREFILL]
        return average_ratio(prefills, seed=self.settings.seed) if len(prefills) > 1 else None

    def judged(self, rounds: Sequence[Round]) -> list[PairedRatio]:
        """The ratios whose intervals are to be narrow."""
        regimes = self.analyse(rounds)
        average = self.average(regimes)
        if average is not None and self.settings.judge_average:
            return [average]
        return [result.ratio for result in regimes if result.claimed]


def measure_rounds(
    baseline: EngineProcess, candidate: EngineProcess, pair: Pair, warm_ups: Sequence[WarmUp], progress: Progress
) -> tuple[list[Round], str, float]:
    """Make rounds until they are as many as wanted, or precise enough, or the bounds are met.

    In a round every batch has its turn, in an order that is reversed from round to round.

    Returns:
        the rounds, one for each batch and turn; the reason why there are no more; the seconds that they took.
    """
    settings = pair.settings
    turns = {cell: steps_per_turn(list(warm_ups), cell, pair.candidate_batch) for cell in settings.cells}
    begun_s, rounds, done, wanted = time.monotonic(), list[Round](), 0, settings.rounds
    while True:
        while done < wanted:
            if done >= settings.rounds and time.monotonic() - begun_s > settings.max_seconds:
                return rounds, f"{settings.max_seconds / 60:g} minutes were over", time.monotonic() - begun_s
            progress("measuring rounds", done, wanted)
            for cell in settings.cells if done % 2 == 0 else settings.cells[::-1]:
                rounds.append(
                    run_round(
                        baseline,
                        candidate,
                        settings.with_cell(cell),
                        candidate_batch=pair.candidate_batch,
                        vocab_size=pair.baseline.vocab,
                        index=done,
                        turn_steps=turns[cell],
                    )
                )
            done += 1
        progress("measuring rounds", done, wanted)
        elapsed_s = time.monotonic() - begun_s
        if settings.precision is None:
            return rounds, f"{done} rounds were asked for", elapsed_s
        ratios = pair.judged(rounds)
        width = max(relative_width(ratio) for ratio in ratios)
        if width <= settings.precision:
            return (
                rounds,
                f"every interval is {width:.1%} wide at most, {settings.precision:.1%} was asked for",
                elapsed_s,
            )
        if done >= settings.max_rounds:
            return rounds, f"{done} rounds are the bound; an interval is still {width:.1%} wide", elapsed_s
        # Half of the missing rounds are added at a time, because the estimate from few rounds is rough.
        missing = max(rounds_for_width(ratio, settings.precision) for ratio in ratios) - done
        wanted = min(done + max(1, missing // 2), settings.max_rounds)
