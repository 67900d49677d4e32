"""An endless stream of examples for sets that are too large to be read before training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from torch.utils.data import IterableDataset

from pat_serve.training.data.encoding import Example, RowEncoder, has_label
from pat_serve.training.data.packing import pack_stream
from pat_serve.training.data.remarks import Remarks
from pat_serve.training.data.row import Tokenizer
from pat_serve.training.data.sources import SkippedRows, iterate_rows

SHUFFLE_BUFFER = 1000


class ExampleStream(IterableDataset[Example]):
    """Reads a source again and again, each pass in another order.

    The order follows from the seed alone (a buffer of 1,000 examples is shuffled as they come), so a resumed run that
    skips what it has seen goes on where it was.

    Args:
        source: as for `load_rows`.
        split: of a hub dataset.
        tokenizer: of the base.
        max_length_tokens: of an example, or of a packed row.
        seed: of the order.
        packing: join examples to rows of `max_length_tokens`.
        skip_bad: leave bad rows out; otherwise the training stops at the first.
    """

    def __init__(
        self,
        source: str,
        split: str,
        tokenizer: Tokenizer,
        max_length_tokens: int,
        *,
        seed: int,
        packing: bool,
        skip_bad: bool,
    ) -> None:
        self.source = source
        self.split = split
        self.tokenizer = tokenizer
        self.max_length_tokens = max_length_tokens
        self.encoder = RowEncoder(tokenizer, max_length_tokens)
        self.remarks = Remarks(source)
        self.seed = seed
        self.packing = packing
        self.skip_bad = skip_bad

    def __iter__(self) -> Iterator[Example]:
        """Yield examples without end, pass after pass."""
        for epoch in count():
            examples = self._shuffled(random.Random(f"{self.seed} {epoch}"), first=epoch == 0)
            yield from pack_stream(examples, self.max_length_tokens) if self.packing else examples

    def examples(self, skipped: SkippedRows | None = None) -> Iterator[Example]:
        """One pass in the source's order, unpacked, without rows that have nothing to learn from.

        Args:
            skipped: counts the bad rows, if they are to be left out.
        """
        return self._examples(skipped or SkippedRows() if self.skip_bad else None)

    def _shuffled(self, rng: random.Random, *, first: bool) -> Iterator[Example]:
        skipped = SkippedRows() if self.skip_bad else None
        buffer: list[Example] = []
        for example in self._examples(skipped):
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(example)
                continue
            at = rng.randrange(SHUFFLE_BUFFER)
            example, buffer[at] = buffer[at], example
            yield example
        rng.shuffle(buffer)
        yield from buffer
        if skipped is not None and first:
            skipped.report(self.source)

    def _examples(self, skipped: SkippedRows | None) -> Iterator[Example]:
        for row in iterate_rows(
            self.source, self.split, self.tokenizer, skipped=skipped, remarks=self.remarks, streaming=True
        ):
            example = self.encoder.encode(row)
            if example is not None and has_label(example):
                yield example
