"""The record of `pat-bench speculative`: a dense model by itself, and the same model with a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.noise import NoiseReport, noise_report
from pat_serve.server.analysis.statistics import PairedRatio, paired_ratio
from pat_serve.server.analysis.trace import RequestTrace

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculativeSettings(_Record):
    """The settings of a comparison.

    Attributes:
        draft_tokens: tokens that the draft proposes in a step.
        output_tokens: of each request, exactly.
        prompt_tokens: of random prompts, and the most of a given one.
        rounds: pairs of runs, one request each.
        load_format: "auto" for real weights, "dummy" for random ones.
        layers: cut both models to so many layers (random weights only).
        dtype: float32 is the only one in which both ways give the same tokens for certain.
        enforce_eager: run without torch.compile.
        seed: of random prompts and bootstrap.
    """

    draft_tokens: int = 3
    output_tokens: int = 48
    prompt_tokens: int = 64
    rounds: int = 12
    load_format: Literal["auto", "dummy"] = "auto"
    layers: int | None = None
    dtype: str = "float32"
    enforce_eager: bool = True
    seed: int = 0


class SpeculativeRound(_Record):
    """The same prompt through both engines.

    Attributes:
        first: the engine that came first.
        plain: timestamps without the draft.
        drafted: timestamps with the draft; the tokens of one step share theirs.
        identical: both gave the same token ids.
        other_cpu_share: share of the machine's CPU time that went to neither engine meanwhile.
    """

    first: Literal["plain", "drafted"]
    plain: RequestTrace
    drafted: RequestTrace
    identical: bool
    other_cpu_share: float


class SpeculativeResult(_Record):
    """A complete comparison.

    Attributes:
        ratio: paired ratio of the seconds per token after the first, without the draft over with it.
        tokens_per_step: mean tokens that a checking step gave, 1 to draft_tokens + 1.
        acceptance: share of the proposed tokens that were kept.
        identical: rounds in which both gave the same token ids.
        noise: of the rounds.
    """

    kind: Literal["speculative"] = "speculative"
    schema_version: int = SCHEMA_VERSION
    date: str
    duration_s: float
    machine: dict[str, str | int | list[str]]
    model: str
    draft: str
    settings: SpeculativeSettings
    ratio: PairedRatio
    tokens_per_step: float
    acceptance: float
    identical: int
    noise: NoiseReport
    rounds: tuple[SpeculativeRound, ...]


def seconds_per_token(trace: RequestTrace) -> float:
    """Seconds per output token after those of the first step."""
    times = trace.tokens_s
    later = sum(time_s > times[0] for time_s in times)
    if not later:
        raise ValueError("all tokens came in one step: ask for more")
    return (times[-1] - times[0]) / later


def summarize_rounds(
    rounds: Sequence[SpeculativeRound], *, draft_tokens: int, seed: int
) -> tuple[PairedRatio, float, float, NoiseReport]:
    """Ratio, tokens a step, acceptance and noise.

    The first step of a request is its prefill, which proposes nothing yet, and the end may cut its last step short.
    Both steps are left out of the tokens a step.
    """
    plain_s = [seconds_per_token(one.plain) for one in rounds]
    drafted_s = [seconds_per_token(one.drafted) for one in rounds]
    steps = [one.drafted.tokens_s.count(time_s) for one in rounds for time_s in sorted(set(one.drafted.tokens_s))[1:-1]]
    mean = sum(steps) / len(steps) if steps else 1.0
    return (
        paired_ratio(plain_s, drafted_s, seed=seed),
        mean,
        (mean - 1) / draft_tokens,
        noise_report(plain_s, drafted_s, [one.first == "plain" for one in rounds]),
    )
