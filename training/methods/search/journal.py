"""The scores of a search on disk, so that an interrupted one need not measure them again.

A search draws its candidates by a seed and by scores alone. Begun again with the scores that it has measured, it comes
to the same candidates at once, and goes on where it was ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pat_serve.training.methods.search.genome import Genome
from pat_serve.training.ranks import Ranks

SCORES_FILE = "search.jsonl"


class Journal:
    """Scores by candidate and batch of rows, a line each; rank 0 writes, and all ranks know the same lines.

    Args:
        folder: the run's, where the file is or will be; None keeps the scores in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        ranks = Ranks.join()
        self._path = None if folder is None else folder / SCORES_FILE
        self._writes = ranks.index == 0
        self._known: dict[tuple[str, int], tuple[float, int]] = ranks.agree(self._read)

    def _read(self) -> dict[tuple[str, int], tuple[float, int]]:
        if self._path is None or not self._path.is_file():
            return {}
        known: dict[tuple[str, int], tuple[float, int]] = {}
        read_bytes = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                found: Any = json.loads(line) if line.endswith(b"\n") else None
                known[found["candidate"], found["batch"]] = float(found["nats"]), int(found["tokens"])
            except (ValueError, TypeError, KeyError):
                # An interruption or a disk has damaged it. What follows is measured again, behind the whole lines.
                os.truncate(self._path, read_bytes)
                break
            read_bytes += len(line)
        return known

    def __len__(self) -> int:
        return len(self._known)

    def find(self, genome: Genome, batch: int) -> tuple[float, int] | None:
        """The sum of KL in nats and the number of tokens, if they were measured.

        Args:
            genome: the candidate.
            batch: number of the batch of rows.
        """
        return self._known.get((_digest(genome), batch))

    def add(self, genome: Genome, batch: int, nats: float, tokens: int) -> None:
        """Keep a score.

        Args:
            genome: the candidate.
            batch: number of the batch of rows.
            nats: sum of KL over its tokens.
            tokens: how many they are.
        """
        candidate = _digest(genome)
        self._known[candidate, batch] = nats, tokens
        if self._path is not None and self._writes:
            line = {"candidate": candidate, "counts": dict(genome.counts), "batch": batch}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "nats": nats, "tokens": tokens}) + "\n")


def _digest(genome: Genome) -> str:
    """A name for a candidate; its indices would fill a hundred kilobytes."""
    return hashlib.sha256(json.dumps([genome.counts, genome.kept]).encode()).hexdigest()[:32]
