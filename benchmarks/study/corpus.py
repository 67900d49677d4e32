"""Texts of the study, split so that nothing that is measured was trained on.

Always there: the Python interpreter's documentation. With a folder of WikiText-2 files and multiple-choice items (as
for `benchmarks.ablation`) these too; the held-out items keep their form, so that pat-eval's own tasks can ask them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation.corpus import row_of
from benchmarks.study import package_docs
from pat_serve.demo.corpus import build_corpus as build_documentation

# Each task holds out so many items, and so do all subjects of MMLU together; the rest goes into training.
HELDOUT_ITEMS = 60
# So many paragraphs of articles are held out.
HELDOUT_PARAGRAPHS = 200
LEAST_CHARACTERS = 200
# A line that so many items of a task begin with is an instruction.
INSTRUCTION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything that is read.

    Attributes:
        base_texts: for the base.
        tune_rows: prompts and completions to tune on.
        heldout_rows: for the perplexity of responses.
        heldout_texts: by name, for perplexity in windows.
        heldout_items: content of the files that pat-eval's --task-data reads, by file name.
    """

    base_texts: list[str]
    tune_rows: list[dict[str, str]]
    heldout_rows: list[dict[str, str]]
    heldout_texts: dict[str, str]
    heldout_items: dict[str, dict[str, dict[str, str]]]

    def save(self, folder: Path) -> None:
        """Write what is tuned on and what is measured."""
        (folder / "items").mkdir(parents=True, exist_ok=True)
        for name, rows in (("tune", self.tune_rows), ("heldout", self.heldout_rows)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for name, text in self.heldout_texts.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        for name, items in self.heldout_items.items():
            (folder / "items" / name).write_text(json.dumps(items), encoding="utf-8")


def build(data: Path | None, seed: int = 0, library: Path | None = None, more: Path | None = None) -> Corpus:
    """Split the texts with a seed.

    Args:
        data: folder with wikitext2.{valid,test}.txt and eval/*.json; None for the documentation alone.
        seed: of the split.
        library: Python's standard library; the running interpreter's when None.
        more: texts for the base, as `package_docs` writes them.
    """
    shuffler = random.Random(seed)
    documentation = build_documentation(library)
    base, tune = list(documentation.base_texts), list(documentation.train_rows)
    texts = {"python": "\n\n".join(f"{row['prompt']}{row['completion']}" for row in documentation.held_out_rows)}
    held: dict[str, dict[str, dict[str, str]]] = {}
    if data is not None:
        paragraphs = [
            line.strip()
            for name in ("test", "valid")
            for line in (data / f"wikitext2.{name}.txt").read_text(encoding="utf-8").splitlines()
            if len(line.strip()) >= LEAST_CHARACTERS
        ]
        shuffler.shuffle(paragraphs)
        tenth = len(paragraphs) // 10
        tune += [row_of(text) for text in paragraphs[:tenth]]
        base += paragraphs[tenth:-HELDOUT_PARAGRAPHS]
        texts["articles"] = "\n\n".join(paragraphs[-HELDOUT_PARAGRAPHS:])
        written, held = _items(data / "eval", shuffler)
        half = len(written) // 2
        base += written[:half]
        tune += [row_of(text) for text in written[half:]]
    if more is not None:
        base += package_docs.read(more)
    shuffler.shuffle(base)
    shuffler.shuffle(tune)
    return Corpus(
        base_texts=base,
        # A short item is all prompt.
        tune_rows=[row for row in tune if row["completion"].strip()],
        heldout_rows=documentation.held_out_rows,
        heldout_texts=texts,
        heldout_items=held,
    )


def _items(folder: Path, shuffler: random.Random) -> tuple[list[str], dict[str, dict[str, dict[str, str]]]]:
    """Items to train on, with their right options written out, and the held-out ones in their own form."""
    groups: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for path in sorted(folder.glob("*.json")):
        # MMLU has a file for each subject; the stem's first two words name it.
        group = "_".join(path.stem.split("_")[:2])
        items = json.loads(path.read_text(encoding="utf-8")).values()
        groups.setdefault(group, []).extend((path.name, item) for item in items)
    written: list[str] = []
    held: dict[str, dict[str, dict[str, str]]] = {}
    for group in groups.values():
        shuffler.shuffle(group)
        context = _contexts([item["origin_prompt"] for _, item in group])
        measured = {context[item["origin_prompt"]] for _, item in group[:HELDOUT_ITEMS]}
        for number, (name, item) in enumerate(group[:HELDOUT_ITEMS]):
            # Nothing of the public model's prediction, which the files hold too.
            held.setdefault(name, {})[str(number)] = {key: item[key] for key in ("origin_prompt", "gold")}
        for _, item in group[HELDOUT_ITEMS:]:
            options = [line for line in item["origin_prompt"].splitlines() if line.startswith(f"{item['gold']}. ")]
            if options and context[item["origin_prompt"]] not in measured:
                # Without letters: the likelihood tasks ask for the words alone.
                stem = item["origin_prompt"].split("\nA. ")[0]
                written.append(f"{stem}\nAnswer: {options[-1][3:]}")
    shuffler.shuffle(written)
    return written, held


def _contexts(prompts: list[str]) -> dict[str, str]:
    """The subject of each item: its first line (a passage, a fact), or its second where the first is the task's own."""
    first = Counter(prompt.split("\n")[0] for prompt in prompts)
    shared = {line for line, count in first.items() if count > len(prompts) * INSTRUCTION_SHARE}
    return {prompt: next(line for line in prompt.split("\n") if line not in shared) for prompt in prompts}
