"""An evolution of cuts: one parent, some children, and the child that stays nearest to the dense model is the next.

The children of a generation are judged in rounds: all on a few rows, the better ones on more, the last ones on the most
(EvoPress, arXiv 2410.14649). The parent takes part in every round, so it is replaced only by what beats it on the same
rows. A score is measured once for each candidate and batch of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pat_serve.terminal.progress import track
from pat_serve.training.methods.search.genome import Genome


@dataclass(kw_only=True)
class Scores:
    """KL to the dense model of each candidate, by batch of rows.

    Attributes:
        measure: the sum of KL over one batch's tokens in nats, and the number of its tokens.
    """

    measure: Callable[[Genome, int], tuple[float, int]]
    known: dict[tuple[Genome, int], tuple[float, int]] = field(default_factory=dict)

    def of(self, genome: Genome, batches: int) -> float:
        """Mean KL of a token over the first batches, in nats."""
        for at in range(batches):
            if (genome, at) not in self.known:
                self.known[genome, at] = self.measure(genome, at)
        parts = [self.known[genome, at] for at in range(batches)]
        return sum(nats for nats, _ in parts) / max(1, sum(tokens for _, tokens in parts))


def evolve(
    first: Genome,
    child: Callable[[Genome], Genome],
    scores: Scores,
    *,
    generations: int,
    offspring: int,
    rounds: Sequence[int],
    told: Callable[[int, Genome, float], None] = lambda *_: None,
) -> Genome:
    """The best candidate after some generations.

    Args:
        first: the first parent.
        child: makes a changed candidate of a parent.
        scores: measure candidates.
        generations: how many.
        offspring: children of each.
        rounds: batches of rows that the rounds of a generation judge on, ascending.
        told: called with the number of a generation from 0, its winner and the winner's score on the last round's rows.
    """
    parent = first
    for generation in track(range(generations), "search", generations):
        children = {child(parent) for _ in range(offspring)} - {parent}
        # Sorted, since a set of its own order would make the order of equal scores a matter of chance.
        left = sorted(children, key=lambda genome: (genome.counts, genome.kept))
        for number, batches in enumerate(rounds):
            bar = scores.of(parent, batches)
            ranked = sorted(left, key=lambda genome: scores.of(genome, batches))
            quota = max(1, offspring // 4 ** (number + 1))
            left = [genome for genome in ranked[:quota] if scores.of(genome, batches) < bar]
        parent = left[0] if left else parent
        told(generation, parent, scores.of(parent, rounds[-1]))
    return parent
