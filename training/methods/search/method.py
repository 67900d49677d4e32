"""Search for Efficient LLMs (arXiv 2409.17372) over what a stock model can be: counts of each axis, and which stay.

An evolution (`evolution.py`) changes shape, layers, groups and channels of a parent, refits what loses inputs by
least squares, and keeps what stays nearest to the dense model on rows of the training data. Its result is cut, refitted
layer by layer and tuned as `cut` does it. Shapes are those along the axes of `--shape` that have as many parameters;
`--fixed-shape` keeps the asked one.

Different from the authors' code: every layer has the same counts, key-value groups go as wholes, a refit solves what
their ADMM approaches (which mends the removed weights there), and fitness is the distance to the dense model's answers
on the training data, and not perplexity on the text that is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic
from torch import Tensor

from pat_serve.cut.axes import FFN, KV_GROUPS, LAYERS
from pat_serve.families.family import Family
from pat_serve.shapes.candidates import axis_grid
from pat_serve.shapes.shape import shape_text
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import say
from pat_serve.training.choices.influence import Influence
from pat_serve.training.choices.perplexity import left_out
from pat_serve.training.method_settings import OwnSettings
from pat_serve.training.methods.cut import Cut
from pat_serve.training.methods.search.evolution import Scores, evolve
from pat_serve.training.methods.search.genome import Breeder, Genome, shapes_alike
from pat_serve.training.methods.search.journal import Journal
from pat_serve.training.methods.search.refits import Refits, removal_errors
from pat_serve.training.search.measure import HeldOut

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe

# Batches of rows that the rounds of a generation judge on, as far as there are so many.
ROUNDS = (1, 3, 8)


class SearchSettings(OwnSettings):
    """Settings of `--method search`."""

    generations: int = pydantic.Field(default=20, ge=1, description="Generations of the search.")
    offspring: int = pydantic.Field(default=16, ge=1, description="Candidates of a generation.")
    fixed_shape: bool = pydantic.Field(
        default=False, description="Search among indices alone, and not among shapes of the same size."
    )


class Search(Cut):
    """The cut is searched for, and tuned like any other."""

    name: ClassVar[str] = "search"
    settings: ClassVar[type[OwnSettings]] = SearchSettings
    searches: ClassVar[bool] = True
    unused: ClassVar[frozenset[str]] = Cut.unused | {"choose"}
    why_unused: ClassVar[str] = "searches for it"

    @classmethod
    def choose(
        cls,
        recipe: TrainRecipe,
        base: Any,
        family: Family,
        shape: Mapping[str, int],
        batches: Sequence[dict[str, Tensor]],
        folder: Path | None = None,
    ) -> dict[str, Tensor]:
        """Search; the base is as it was afterwards. Its scores are kept in the run's folder (`journal.py`)."""
        settings = SearchSettings.of(recipe)
        sizes = ModelSizes.of(base.config.to_dict(), family)
        asked = {axis: count for axis, count in shape.items() if axis in cls.axes}
        rows = batches[: ROUNDS[-1]]
        base.eval()
        answers = [HeldOut.of(base, [row]) for row in rows]
        refits = Refits(base, family, sizes, [axis for axis in (FFN, KV_GROUPS) if axis in asked], batches)
        scores_I = {line: removal_errors(refits.inputs(line)) for line in refits.writers}
        if LAYERS in asked:
            influence_L = Influence().importance(base, sizes.layers, batches)
            # Whoever enters or ends the model stays in the first candidates.
            influence_L[:2] = influence_L[-2:] = 2 * influence_L.max()
            scores_I[LAYERS] = influence_L
        shapes = [asked]
        if not settings.fixed_shape:
            shapes = shapes_alike(sizes, asked, {axis: axis_grid(axis, sizes, family) for axis in asked})
        breeder = Breeder(sizes, scores_I, shapes, recipe.seed)
        journal = Journal(folder)
        if len(journal):
            say(f"search: {len(journal)} scores were measured before")

        def measure(genome: Genome, at: int) -> tuple[float, int]:
            if (known := journal.find(genome, at)) is not None:
                return known
            refits.load(genome)
            stays = genome.of(LAYERS)
            dropped = [] if stays is None else sorted(set(range(sizes.layers)) - set(stays))
            with left_out(base, dropped):
                tokens = len(answers[at].dense[0])
                nats = answers[at].losses(base)[1] * tokens
            journal.add(genome, at, nats, tokens)
            return nats, tokens

        scores = Scores(measure=measure)
        rounds = sorted({min(batches, len(rows)) for batches in ROUNDS})
        first = breeder.first(asked)
        say(f"search: {len(shapes)} shapes; {_told(first)} is {scores.of(first, rounds[-1]):.4f} nats from dense")
        try:
            best = evolve(
                first,
                breeder.child,
                scores,
                generations=settings.generations,
                offspring=settings.offspring,
                rounds=rounds,
                told=lambda number, genome, nats: say(
                    f"search: generation {number + 1}: {_told(genome)}, {nats:.4f} nats"
                ),
            )
        finally:
            refits.load(None)
        measured = len({genome for genome, _ in scores.known})
        say(f"search: {_told(best)} is {scores.of(best, rounds[-1]):.4f} nats from dense, best of {measured}")
        return best.tensors()


def _told(genome: Genome) -> str:
    return shape_text(dict(genome.counts))
