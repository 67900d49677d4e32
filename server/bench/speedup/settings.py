"""The settings of a speed-up check."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.verdict import DEFAULT_MARGIN, Claim
from pat_serve.server.bench.speedup.grid import Cell, Named, Regime
from pat_serve.server.engine.memory import Batch

# The paper measures the time to the first tokens of batches of 128-token prompts, averaged over batch sizes.
PAPER_BATCH_SIZES, PAPER_PROMPT_TOKENS = (1, 2, 4, 8), 128


class SpeedupSettings(BaseModel):
    """The settings of a check. The defaults are meant for a small CPU machine.

    Attributes:
        claim: the speed-up to check.
        margin: share of the claim by which an interval may miss it and still meet it; 0 reads it strictly.
        batch_size: requests at once.
        batch_sizes: several batch sizes, each measured in every round and judged by itself; replaces `batch_size`.
        grid: several batches, each with prompts of its own length, measured and judged in the same way; replaces
            `batch_size`, `batch_sizes` and `prompt_tokens`.
        named: the parts of the grid that the claim names, which alone decide the verdict; empty for all of it.
        judge_average: the claim is about the average over the batch sizes, as the paper's is.
        fixed_memory: the candidate gets as many requests as fit into the memory that the baseline takes with
            `batch_size` of them, and the ratio is that of seconds per request or token over the whole batch.
        prompt_tokens: of each request.
        output_tokens: of each request, where decode is measured; prefill alone needs one.
        rounds: pairs of runs, at least.
        precision: go on until every interval is no wider than this, relative to its median; None makes `rounds` rounds.
        max_rounds: with `precision`, at most so many rounds.
        max_seconds: with `precision`, no round begins after so many seconds.
        regimes: phases to judge.
        layers: cut both models to so many layers (random weights only).
        depths: several numbers of layers, each measured by itself; the verdict is then on what their lines give for the
            models' own depths. Replaces `layers`.
        load_format: "auto" for real weights, "dummy" for random ones.
        dtype: "auto" lets the machine decide.
        enforce_eager: run without torch.compile.
        roofline: probe the machine and put each model's floor beside its seconds.
        seed: of prompts, random weights and bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: float = 1.33
    margin: float = DEFAULT_MARGIN
    batch_size: int = 1
    batch_sizes: tuple[int, ...] = ()
    grid: tuple[Cell, ...] = ()
    named: tuple[Named, ...] = ()
    judge_average: bool = False
    fixed_memory: bool = False
    prompt_tokens: int = 128
    output_tokens: int = 9
    rounds: int = 12
    precision: float | None = None
    max_rounds: int = 60
    max_seconds: float = 900.0
    regimes: tuple[Regime, ...] = (Regime.PREFILL, Regime.DECODE)
    layers: int | None = None
    depths: tuple[int, ...] = ()
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: str = "auto"
    # Measured on 2 Zen 3 cores (both 7B shapes cut to 2 layers, float32, eager against compiled in paired rounds):
    # compiled, prefill is 5 to 9 % faster and decode 1 to 6 %, for both models alike within their intervals; but an
    # engine takes over a minute longer to start, and needs a C++ compiler. pat-serve starts eager on CPU as well.
    enforce_eager: bool = True
    roofline: bool = True
    seed: int = 0

    @property
    def claimed(self) -> Claim:
        """The claim with its margin."""
        return Claim(ratio=self.claim, margin=self.margin)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The batches of every round."""
        sizes = self.batch_sizes or (self.batch_size,)
        return self.grid or tuple(Cell(batch_size=size, prompt_tokens=self.prompt_tokens) for size in sizes)

    @property
    def largest_batch(self) -> int:
        """The most requests that an engine must hold at once."""
        return max(cell.batch_size for cell in self.cells)

    @property
    def tokens_per_request(self) -> int:
        """Prompt and output of one request, the longest."""
        return max(cell.prompt_tokens for cell in self.cells) + self.generated_tokens

    @property
    def full_batches(self) -> tuple[Batch, ...]:
        """The batches that an engine has to hold, one at a time."""
        return tuple(
            Batch(
                requests=cell.batch_size,
                prompt_tokens=cell.prompt_tokens,
                tokens_per_request=cell.prompt_tokens + self.generated_tokens,
            )
            for cell in self.cells
        )

    def with_cell(self, cell: Cell) -> SpeedupSettings:
        """The same settings with one batch of prompts of one length."""
        own = {"batch_size": cell.batch_size, "prompt_tokens": cell.prompt_tokens}
        return self.model_copy(update={**own, "batch_sizes": (), "grid": (), "named": ()})

    def with_batch(self, batch_size: int) -> SpeedupSettings:
        """The same settings with one batch size."""
        return self.with_cell(Cell(batch_size=batch_size, prompt_tokens=self.prompt_tokens))

    def names(self, regime: Regime, cell: Cell) -> bool:
        """Whether the claim is about a phase of a cell."""
        return not self.named or any(one.holds(regime, cell) for one in self.named)

    def with_layers(self, layers: int | None) -> SpeedupSettings:
        """The same settings at one depth."""
        return self.model_copy(update={"layers": layers, "depths": ()})

    @property
    def measured_depths(self) -> tuple[int | None, ...]:
        """The layers that both models are cut to, one after the other, the fewest first; None is all of them."""
        return tuple(sorted(self.depths)) or (self.layers,)

    @property
    def repeats_prompts(self) -> bool:
        """Whether every round has the same prompts, so that engines read them from their prefix caches.

        Nothing judges prefill then, and the prefill of long prompts takes a hundred times the time of decode.
        """
        return self.regimes == (Regime.DECODE,)

    @property
    def generated_tokens(self) -> int:
        """Tokens that each request really generates."""
        return self.output_tokens if Regime.DECODE in self.regimes else 1
