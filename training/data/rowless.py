"""Training data whose tokens all have a row in the base's embedding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from torch import Tensor

from pat_serve.terminal.progress import say
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.training.data.encoding import Example, PadBatch
from pat_serve.training.data.training_data import TrainingData


def check_vocabulary(data: TrainingData, vocabulary: Vocabulary) -> None:
    """Say what tokens have no row, and refuse data that hold one: all of a file, the first examples of a stream.

    Raises:
        DataError: naming the tokens.
    """
    if vocabulary.warning:
        say(f"warning: {vocabulary.warning}")
    train = data.train if isinstance(data.train, list) else data.samples
    vocabulary.require(_ids(train), "--data")
    vocabulary.require(_ids(data.held_out or ()), "the held-out rows")


class CheckedBatch(PadBatch):
    """Collates a stream's examples, which nobody has seen before.

    Args:
        vocabulary: of the base.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """See `PadBatch`.

        Raises:
            DataError: an example has a token without a row.
        """
        self.vocabulary.require(_ids(examples), "--data")
        return super().__call__(examples)


def _ids(examples: Iterable[Example]) -> Iterable[int]:
    return chain.from_iterable(example["input_ids"] for example in examples)
