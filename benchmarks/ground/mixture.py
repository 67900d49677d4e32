"""The order of the rows: every beginning of the file has the sources in the same shares, until one runs out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.ground.passages import Passage, draw


def mix(passages: Sequence[Passage], weights: Mapping[str, float], seed: str) -> list[Passage]:
    """Order passages so that a short run on the first of them sees every source.

    Args:
        passages: in any order; the result does not depend on it.
        weights: by source, its share of the characters while all sources last.
        seed: of the order within a source.
    """
    by_source: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        by_source[passage.source].append(passage)
    placed: list[tuple[float, str, Passage]] = []
    for source, own in by_source.items():
        total = 0
        for passage in sorted(own, key=lambda each: (draw(seed, each.text), each.text)):
            placed.append(((total + len(passage.text) / 2) / weights[source], source, passage))
            total += len(passage.text)
    return [passage for _, _, passage in sorted(placed, key=lambda each: each[:2])]
