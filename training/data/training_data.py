"""From a recipe to what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pat_serve.errors import DataError, UsageError
from pat_serve.terminal.progress import say
from pat_serve.training.data.calibration_samples import calibration_samples
from pat_serve.training.data.encoding import Example, encode_rows
from pat_serve.training.data.packing import pack_examples
from pat_serve.training.data.row import Tokenizer
from pat_serve.training.data.sources import SkippedRows, load_rows
from pat_serve.training.data.streaming import ExampleStream

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe

# So many rows of a stream are checked and hashed before the training starts.
STREAM_HEAD = 1000


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Data that a run reads.

    Attributes:
        train: rows for the Trainer, packed if the recipe says so.
        held_out: rows for the evaluation, never packed; None without one.
        samples: the first training examples, unpacked, for the calibration and the export's parity prompts.
        longest_tokens: of a training row; of a stream, the most that one may have.
        train_sha256: of the training rows; of a stream, its name and the hash of its first 1,000 examples.
        held_out_sha256: likewise, None without an evaluation.
        end_token_ids: the special tokens that training answers end with; of a stream, those of its first examples.
    """

    train: list[Example] | ExampleStream
    held_out: list[Example] | None
    samples: list[Example]
    longest_tokens: int
    train_sha256: str
    held_out_sha256: str | None
    end_token_ids: tuple[int, ...]

    def rows(self) -> int | None:
        """How many rows an epoch has; None of a stream."""
        return len(self.train) if isinstance(self.train, list) else None


def read_training_data(recipe: TrainRecipe, tokenizer: Tokenizer) -> TrainingData:
    """Read, check and encode everything that the recipe names.

    Raises:
        DataError: a source or a row is unusable.
        UsageError: settings contradict each other, or leave nothing to train on.
    """
    held_out = None
    if recipe.eval_data is not None:
        rows = load_rows(
            recipe.eval_data, recipe.eval_split, tokenizer, flag="--eval-data", skip_bad=recipe.skip_bad_rows
        )
        held_out, dropped = encode_rows(rows, tokenizer, recipe.max_length_tokens)
        if dropped:
            say(f"--eval-data: {dropped} of {len(rows)} rows left out: their prompt alone fills the length")
    if recipe.streaming:
        return _stream(recipe, tokenizer, held_out)
    rows = load_rows(recipe.data, recipe.data_split, tokenizer, skip_bad=recipe.skip_bad_rows)
    ends: set[int] = set()
    examples, dropped = encode_rows(rows, tokenizer, recipe.max_length_tokens, ends)
    if dropped:
        say(f"{dropped} of {len(rows)} rows left out: their prompt alone fills {recipe.max_length_tokens} tokens")
    if recipe.eval_share is not None:
        examples, held_out = split_examples(examples, recipe.eval_share, recipe.seed)
    train = pack_examples(examples, recipe.max_length_tokens) if recipe.packing else examples
    if recipe.packing:
        fill = sum(len(example["input_ids"]) for example in examples) / (len(train) * recipe.max_length_tokens)
        say(f"{len(examples)} examples packed into {len(train)} rows, {fill:.0%} full")
    return TrainingData(
        train=train,
        held_out=held_out,
        samples=calibration_samples(examples, recipe.calibration_rows),
        longest_tokens=max(len(example["input_ids"]) for example in train),
        train_sha256=examples_sha256(train),
        held_out_sha256=examples_sha256(held_out) if held_out is not None else None,
        end_token_ids=tuple(sorted(ends)),
    )


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by the seed alone; both in their old order.

    Raises:
        UsageError: one of the two would be empty.
    """
    held_out_count = round(share * len(examples))
    if not 1 <= held_out_count < len(examples):
        raise UsageError(
            "--eval-share",
            expected="a share that holds out at least one row and leaves one to train on",
            found=f"{share} of {len(examples)} rows",
            fix="Change it, or name other data with --eval-data.",
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), held_out_count))
    kept = [example for number, example in enumerate(examples) if number not in chosen]
    return kept, [examples[number] for number in sorted(chosen)]


def examples_sha256(examples: Sequence[Example]) -> str:
    """Hash the encoded rows, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example["input_ids"], example["labels"]]).encode())
    return digest.hexdigest()


def _stream(recipe: TrainRecipe, tokenizer: Tokenizer, held_out: list[Example] | None) -> TrainingData:
    stream = ExampleStream(
        recipe.data,
        recipe.data_split,
        tokenizer,
        recipe.max_length_tokens,
        seed=recipe.seed,
        packing=recipe.packing,
        skip_bad=recipe.skip_bad_rows,
    )
    skipped = SkippedRows()
    first = list(islice(stream.examples(skipped), max(STREAM_HEAD, recipe.calibration_rows or 0)))
    head = first[:STREAM_HEAD]
    # A run may end before its first pass through the source does, which reports the whole of it.
    skipped.report(f"{recipe.data}, before its first {len(first)} examples end")
    if not head:
        raise DataError(
            f"--data {recipe.data}",
            expected=f"at least one row with a response within --max-length-tokens {recipe.max_length_tokens}",
            found="none",
            fix="Raise --max-length-tokens, or give a dataset with rows.",
        )
    identity = f"{recipe.data}[{recipe.data_split}], first {len(head)} examples: {examples_sha256(head)}"
    say(f"streaming {recipe.data}: inputs.json records its name and its first {len(head)} examples, not the whole set")
    return TrainingData(
        train=stream,
        held_out=held_out,
        samples=calibration_samples(first, recipe.calibration_rows),
        longest_tokens=recipe.max_length_tokens,
        train_sha256=identity,
        held_out_sha256=examples_sha256(held_out) if held_out is not None else None,
        end_token_ids=tuple(sorted(stream.encoder.ends)),
    )
