"""Real text for the ablation, split so that nothing that is measured was trained on.

From a folder with WikiText-2's validation and test files and multiple-choice items (`eval/*.json`, each a mapping of
number to `origin_prompt` and `gold`): texts for the base, rows to tune on, held-out rows of articles and of items.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

LEAST_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts and rows; a row is `prompt` and `completion`."""

    base_texts: list[str]
    tune_rows: list[dict[str, str]]
    heldout_articles: list[dict[str, str]]
    heldout_items: list[dict[str, str]]

    def save(self, folder: Path) -> None:
        """Write the three sets of rows as JSONL."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tune_rows", "heldout_articles", "heldout_items"):
            lines = [json.dumps(row) + "\n" for row in getattr(self, name)]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_corpus(data: Path, seed: int = 0, heldout: int = 200) -> Corpus:
    """Split the texts with a seed.

    Half of the items and nine tenths of the articles go to the base; the other half is for tuning, less what is held
    out. So the tuning is what PAT is used for: instruction-shaped rows of a domain that the base has seen in part.
    """
    shuffler = random.Random(seed)
    articles = [p for name in ("test", "valid") for p in _paragraphs(data / f"wikitext2.{name}.txt")]
    items = [text for path in sorted((data / "eval").glob("*.json")) for text in _items(path)]
    shuffler.shuffle(articles)
    shuffler.shuffle(items)
    half = len(items) // 2
    tune = items[half:-heldout] + articles[: len(articles) // 10]
    shuffler.shuffle(tune)
    base = items[:half] + articles[len(articles) // 10 : -heldout]
    shuffler.shuffle(base)
    return Corpus(
        base_texts=base,
        tune_rows=[row_of(text) for text in tune],
        heldout_articles=[row_of(text) for text in articles[-heldout:]],
        heldout_items=[row_of(text) for text in items[-heldout:]],
    )


def _paragraphs(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) >= LEAST_CHARACTERS]


def _items(path: Path) -> list[str]:
    """Every item with its right option written out, since a letter alone is a target of one token."""
    texts = []
    for item in json.loads(path.read_text(encoding="utf-8")).values():
        options = [line for line in item["origin_prompt"].splitlines() if line.startswith(f"{item['gold']}. ")]
        if options:
            texts.append(f"{item['origin_prompt'].rstrip()} {options[-1]}")
    return texts


def row_of(text: str) -> dict[str, str]:
    """The first few words prompt the rest: nearly every token counts in the loss."""
    words = text.split(" ")
    return {"prompt": " ".join(words[:6]), "completion": " " + " ".join(words[6:])}
