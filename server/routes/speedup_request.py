"""The HTTP contract of `/benchmark/speedup` and of the baseline."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pat_serve.server.analysis.verdict import DEFAULT_MARGIN, MARGIN_BOUND, MIN_ROUNDS
from pat_serve.server.bench.speedup.grid import Cell
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.http.limits import MAX_BATCH_SIZE, MAX_GRID_CELLS, MAX_ROUNDS
from pat_serve.server.routes.schemas import Body, TokenCount

# Strict types take no plain string for a Regime.
RegimeName = Literal["prefill", "decode"]


class GridCell(Body):
    """So many requests at once, each with so many prompt tokens."""

    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
    prompt_tokens: TokenCount

    @property
    def cell(self) -> Cell:
        """The cell of the check's grid."""
        return Cell(batch_size=self.batch_size, prompt_tokens=self.prompt_tokens)


class ClaimedCell(GridCell):
    """A cell of the grid that the claim names, in one phase or in both."""

    regime: RegimeName | None = None


class SpeedupRequest(Body):
    """`POST /benchmark/speedup`: the claim, and what to measure, as in `pat-bench speedup`."""

    claim: Annotated[float, Field(gt=0, le=100)] = 1.33
    margin: Annotated[
        float,
        Field(ge=0, lt=MARGIN_BOUND, description="Share of the claim by which an interval may miss it; 0 is strict."),
    ] = DEFAULT_MARGIN
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 1
    prompt_tokens: TokenCount = 128
    grid: Annotated[
        list[GridCell],
        Field(
            max_length=MAX_GRID_CELLS,
            default_factory=list,
            description="Several batches, each judged by itself, in place of batch_size and prompt_tokens.",
        ),
    ]
    output_tokens: Annotated[TokenCount, Field(description="At least 2 where decode is judged.")] = 17
    rounds: Annotated[int, Field(ge=MIN_ROUNDS, le=MAX_ROUNDS, description="Pairs of runs.")] = 12
    regimes: Annotated[
        list[RegimeName], Field(min_length=1, max_length=2, default_factory=lambda: ["prefill", "decode"])
    ]
    claim_at: Annotated[
        list[ClaimedCell],
        Field(
            max_length=2 * MAX_GRID_CELLS,
            default_factory=list,
            description="What the claim names, which alone decides the verdict; empty for all.",
        ),
    ]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    force: Annotated[
        bool, Field(description="Run also while users are being served; the verdict is then inconclusive.")
    ] = False

    @model_validator(mode="after")
    def _decode_has_a_step(self) -> Self:
        if "decode" in self.regimes and self.output_tokens < 2:
            raise ValueError("output_tokens must be at least 2 to time decode")
        return self

    @field_validator("grid")
    @classmethod
    def _every_cell_once(cls, grid: list[GridCell]) -> list[GridCell]:
        if len({one.cell for one in grid}) < len(grid):
            raise ValueError("grid must not hold a cell twice")
        return grid

    @field_validator("claim_at")
    @classmethod
    def _claim_is_measured(cls, claim_at: list[ClaimedCell], info: ValidationInfo) -> list[ClaimedCell]:
        """A validator of this field, which comes after all that it looks at, so that the error names it."""
        seen = info.data
        if not {"batch_size", "prompt_tokens", "grid", "regimes"} <= seen.keys():
            return claim_at
        alone = GridCell(batch_size=seen["batch_size"], prompt_tokens=seen["prompt_tokens"])
        cells = {known.cell for known in seen["grid"] or [alone]}
        for one in claim_at:
            if one.cell not in cells or (one.regime or seen["regimes"][0]) not in seen["regimes"]:
                raise ValueError(f"claim_at names {one.cell}, which grid and regimes do not measure")
        return claim_at


class LiveSpeedupResult(SpeedupResult):
    """The answer: the result of `pat-bench speedup`, and how many requests of users ran meanwhile."""

    other_requests: int
