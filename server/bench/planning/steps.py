"""The seconds of an engine's step, between the points that were measured and never beyond them. Pure mathematics."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pat_serve.errors import UsageError

# More work that takes so much less time was measured while the machine had less to do besides.
_DISTURBED = 0.85


@dataclass(frozen=True, kw_only=True)
class MeasuredCell:
    """One point of a measured grid.

    Attributes:
        batch_size: requests at once.
        prompt_tokens: of each request.
        output_tokens: of each request.
        prefill_s: mean seconds from submission until all have their first token.
        step_s: mean seconds of a decode step; None where a single token was generated.
    """

    batch_size: int
    prompt_tokens: int
    output_tokens: int
    prefill_s: float
    step_s: float | None

    @property
    def context_tokens(self) -> float:
        """Mean tokens in a request's KV cache over the decode steps."""
        return self.prompt_tokens + self.output_tokens / 2


class StepTimes:
    """Seconds of a step that prefills some prompts and decodes for other requests, from a measured grid.

    Prefill is linear between batch sizes and between prompt lengths, decode between batch sizes and between mean
    contexts. A step of both pays once for what every step pays whatever its batch (the weights are read once): with p
    the prefill, d(b) the decode step of b requests, it takes p + d(b) - d(1), and neither less than p nor than d(b).

    Args:
        cells: the grid; every batch size with every prompt and output length, batch 1 among them.
        name: of the model, for messages.

    Raises:
        UsageError: no cell, no batch of one, or a point of the grid that is missing.
    """

    def __init__(self, cells: Sequence[MeasuredCell], *, name: str) -> None:
        self.name = name
        prefill: dict[tuple[int, int], list[float]] = {}
        decode: dict[tuple[int, float], list[float]] = {}
        for cell in cells:
            prefill.setdefault((cell.batch_size, cell.prompt_tokens), []).append(cell.prefill_s)
            if cell.step_s is not None:
                decode.setdefault((cell.batch_size, cell.context_tokens), []).append(cell.step_s)
        # Points that several output lengths share are measured several times.
        self._prefill = _Grid({key: sum(times) / len(times) for key, times in prefill.items()}, name, "prompt")
        self._decode = _Grid({key: sum(times) / len(times) for key, times in decode.items()}, name, "mean context")
        self.batches = self._prefill.rows
        if 1 not in self.batches or (decode and self._decode.rows != self.batches):
            raise UsageError(
                name,
                expected="every batch size measured with prefill and decode, batch 1 among them",
                found=f"prefill at {_listed(self.batches)}, decode at {_listed(self._decode.rows)}",
                fix="Measure with pat-bench latency --batch-size 1,... --output-tokens 16 or more.",
            )
        self.prompts = (min(self._prefill.columns), max(self._prefill.columns))
        stepped = [cell for cell in cells if cell.step_s is not None]
        # A cell's decode steps ran over all these contexts, and its time stands for their mean.
        self.contexts = (
            (
                min(cell.prompt_tokens for cell in stepped),
                max(cell.prompt_tokens + cell.output_tokens for cell in stepped),
            )
            if stepped
            else None
        )

    @property
    def largest_batch(self) -> int:
        """The largest batch size that was measured."""
        return self.batches[-1]

    def doubts(self) -> list[str]:
        """Pairs of points whose order no undisturbed machine gives, in words: more work in much less time."""
        return [
            *self._prefill.doubts(lambda row, at: f"prefill of {row} x {at:g}"),
            *self._decode.doubts(lambda row, at: f"a decode step of {row} at context {at:g}"),
        ]

    def check(self, *, prompt_tokens: tuple[int, int], longest: int, decodes: bool) -> None:
        """Refuse traffic outside the measured range: nothing is extrapolated.

        Args:
            prompt_tokens: the shortest prompt and the longest.
            longest: tokens of the longest request, prompt and output.
            decodes: whether any request has a second token.

        Raises:
            UsageError: naming the range that is missing.
        """
        low, high = self.prompts
        if prompt_tokens[0] < low or prompt_tokens[1] > high:
            raise UsageError(
                "--prompt-tokens",
                expected=f"{low} to {high}, the prompts that were measured of {self.name}",
                found=f"{prompt_tokens[0]} to {prompt_tokens[1]}",
                fix=f"Measure with pat-bench latency --prompt-tokens {prompt_tokens[0]},{prompt_tokens[1]}; "
                "nothing is extrapolated.",
            )
        if decodes and (self.contexts is None or longest > self.contexts[1]):
            reach = "no decode step" if self.contexts is None else f"contexts up to {self.contexts[1]}"
            raise UsageError(
                "--output-tokens",
                expected=f"requests within what was measured of {self.name}: {reach}",
                found=f"requests of {longest} tokens",
                fix=f"Measure with pat-bench latency --output-tokens {longest - low} or more; nothing is extrapolated.",
            )

    def prefill_s(self, batch: int, prompt_tokens: float) -> float:
        """Seconds of a prefill of `batch` prompts of that mean length."""
        return self._prefill.at(batch, prompt_tokens)

    def decode_s(self, batch: int, context_tokens: float) -> float:
        """Seconds of a decode step of `batch` requests with that mean context."""
        return self._decode.at(batch, context_tokens)

    def step_s(self, *, prompts: int, prompt_tokens: float, decoding: int, context_tokens: float) -> float:
        """Seconds of a step.

        Args:
            prompts: number of prompts that the step prefills.
            prompt_tokens: mean length of the prompts.
            decoding: number of requests that the step gives one more token.
            context_tokens: mean context of these requests.
        """
        if not decoding:
            return self.prefill_s(prompts, prompt_tokens)
        decode = self.decode_s(decoding, context_tokens)
        if not prompts:
            return decode
        prefill = self.prefill_s(prompts, prompt_tokens)
        return max(prefill, decode, prefill + decode - self.decode_s(1, context_tokens))


class _Grid:
    """A function of (row, column) known at every crossing; linear between them, constant beyond the outer ones."""

    def __init__(self, points: Mapping[tuple[int, float], float], name: str, column: str) -> None:
        self.rows = tuple(sorted({row for row, _ in points}))
        self.columns = tuple(sorted({at for _, at in points}))
        for row in self.rows:
            for at in self.columns:
                if (row, at) not in points:
                    raise UsageError(
                        name,
                        expected="a full grid: every batch size with every prompt and output length",
                        found=f"nothing measured at batch {row}, {column} {at:g}",
                        fix="Measure all in one run: pat-bench latency --batch-size 1,... --prompt-tokens ....",
                    )
        self._values = [[points[row, at] for at in self.columns] for row in self.rows]

    def doubts(self, named: Callable[[int, float], str]) -> list[str]:
        crossings = [(i, j) for i in range(len(self.rows)) for j in range(len(self.columns))]
        return [
            f"{named(self.rows[i], self.columns[j])} took {1000 * self._values[i][j]:.3g} ms, "
            f"{named(self.rows[k], self.columns[m])} took {1000 * self._values[k][m]:.3g} ms"
            for i, j in crossings
            for k, m in ((i + 1, j), (i, j + 1))
            if (k, m) in crossings and self._values[k][m] < _DISTURBED * self._values[i][j]
        ]

    def at(self, row: float, column: float) -> float:
        low, high, share = _between(self.rows, row)
        left, right, along = _between(self.columns, column)
        below, above = self._values[low], self._values[high]
        first = below[left] + (below[right] - below[left]) * along
        second = above[left] + (above[right] - above[left]) * along
        return first + (second - first) * share


def _between(axis: Sequence[float], value: float) -> tuple[int, int, float]:
    """The neighbours of a value on an axis, and how far it is from the first to the second."""
    high = bisect_right(axis, value)
    if high == 0:
        return 0, 0, 0.0
    if high == len(axis):
        return high - 1, high - 1, 0.0
    return high - 1, high, (value - axis[high - 1]) / (axis[high] - axis[high - 1])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
