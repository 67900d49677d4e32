"""Everything but the model's own answers: read, parted, filtered, ordered, written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.ground import debian, local
from benchmarks.ground.mixture import mix
from benchmarks.ground.overlap import KeptOut, Seen, grams
from benchmarks.ground.passages import Document, Passage, draw, passages_of, row_of
from pat_serve.errors import DataError, UsageError, first_line
from pat_serve.files.atomic import write_json, write_text
from pat_serve.files.text_files import read_utf8
from pat_serve.terminal.progress import say, track

# By source, its share of the characters of any beginning of the rows, while all sources last.
WEIGHTS = {
    "articles": 0.20, "books": 0.25, "items": 0.10, "python": 0.10, "wordnet": 0.10, "gcide": 0.08, "fortunes": 0.08,
    "foldoc": 0.05, "jargon": 0.03, "devil": 0.01, "answers": 0.30,
}  # fmt: skip
# Items have halves of their own, and modules are held out by their names.
_WHOLE = ("items", "python")
_HELD_OUT_SHARE = 0.05
HELD_OUT_CHARACTERS = 400_000
HELD_OUT_ROWS = 300
_SEED = "ground"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The sources that the rows are made of.

    Attributes:
        wikitext2_valid: WikiText-2's validation file, or None.
        items: folder of multiple-choice items, or None.
        keep_out: files of text that must not be trained on; only hashes of them are made.
        debs: folder of .deb files, those that are missing are downloaded into; None leaves the packages out.
        libraries: folders of Python sources; the interpreter's when None.
        characters: of one source at most.
    """

    wikitext2_valid: Path | None = None
    items: Path | None = None
    keep_out: tuple[Path, ...] = ()
    debs: Path | None = None
    libraries: list[Path] | None = None
    characters: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much of a source was read and kept.

    Attributes:
        passages: that became rows.
        characters: of these.
        held_out: passages of the held-out documents.
        touching: passages left out because they share a 13-gram with something that is kept out.
        repeating: passages left out because most of them was there before.
    """

    passages: int
    characters: int
    held_out: int
    touching: int
    repeating: int


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The files and counts of a build.

    Attributes:
        trained: passages in the order of the rows.
        held_out: passages of documents that nothing is trained on, in order.
        kept: by source.
        packages: that were read.
        measured: held-out items, as pat-eval's --task-data reads them, by file name.
        inputs: what it was made of.
    """

    trained: list[Passage]
    held_out: list[Passage]
    kept: dict[str, Kept]
    packages: list[debian.Unpacked]
    measured: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    inputs: Inputs


def build(inputs: Inputs) -> Ground:
    """Read every source and part it.

    Raises:
        PatServeError: an input cannot be read, or there is none.
    """
    unseen = [text for path in inputs.keep_out for text in _lines(path)]
    documents: list[Document] = []
    if inputs.wikitext2_valid is not None:
        documents += local.articles(inputs.wikitext2_valid)
    found = local.items(inputs.items) if inputs.items is not None else local.Items(trained=[], measured={})
    documents += found.trained
    unseen += found.measured_texts()
    packages = _packages(inputs.debs) if inputs.debs is not None else []
    documents += [document for package in packages for document in package.documents]
    say("reading Python's documentation")
    documents += local.documentation(inputs.characters, inputs.libraries)
    if not documents:
        raise UsageError("--out", expected="something to read", found="no source", fix="Name --wikitext2-valid.")
    held, trained = _parted(documents, inputs.characters)
    held_passages = _distinct([passage for document in held for passage in passages_of(document)])
    kept_out = KeptOut([*unseen, *(passage.text for passage in held_passages)])
    passages, dropped = _filtered(trained, kept_out)
    mixed_held = mix(held_passages, WEIGHTS, _SEED)
    return Ground(
        trained=mix(passages, WEIGHTS, _SEED),
        held_out=_first(mixed_held, HELD_OUT_CHARACTERS),
        kept=_counts(passages, held_passages, dropped),
        packages=packages,
        measured=found.measured,
        inputs=inputs,
    )


def write(ground: Ground, out: Path) -> None:
    """Write rows, held-out text and held-out items; every file is complete or absent."""
    write_text(out / "train.jsonl", _jsonl(row_of(passage.text) for passage in ground.trained))
    write_text(out / "heldout.txt", "\n\n".join(passage.text for passage in ground.held_out) + "\n")
    write_text(out / "heldout.jsonl", _jsonl(row_of(passage.text) for passage in ground.held_out[:HELD_OUT_ROWS]))
    for name, content in ground.measured.items():
        write_json(out / "items" / name, content)


def _packages(folder: Path) -> list[debian.Unpacked]:
    read = []
    for package in track(debian.PACKAGES, "packages"):
        path = debian.fetch(package, folder)
        if path is not None:
            read.append(debian.unpack(package, path))
    return read


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in read_utf8(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            path, expected="a text file in UTF-8", found=first_line(error), fix="Check --keep-out."
        ) from error


def _parted(documents: Sequence[Document], characters: int) -> tuple[list[Document], list[Document]]:
    """Documents that are held out, and those to train on; of each source no more than so many characters."""
    held, trained = [], []
    totals: Counter[str] = Counter()
    for document in sorted(documents, key=lambda each: draw(_SEED, each.source, each.name)):
        totals[document.source] += sum(map(len, document.paragraphs))
        if totals[document.source] > characters:
            continue
        share = 0.0 if document.source in _WHOLE else _HELD_OUT_SHARE
        (held if draw("held out", document.source, document.name) < share else trained).append(document)
    return held, trained


def _distinct(passages: Iterable[Passage]) -> list[Passage]:
    seen = Seen()
    return [passage for passage in passages if not seen.repeats(grams(passage.text))]


def _filtered(documents: Sequence[Document], kept_out: KeptOut) -> tuple[list[Passage], Counter[tuple[str, str]]]:
    """Passages that touch nothing kept out and repeat nothing, and by source and reason how many others there were."""
    seen, passages = Seen(), []
    dropped: Counter[tuple[str, str]] = Counter()
    for document in track(documents, "passages"):
        for passage in passages_of(document):
            found = grams(passage.text)
            if kept_out.touches(found):
                dropped[passage.source, "touching"] += 1
            elif seen.repeats(found):
                dropped[passage.source, "repeating"] += 1
            else:
                passages.append(passage)
    return passages, dropped


def _counts(passages: Sequence[Passage], held: Sequence[Passage], dropped: Counter[tuple[str, str]]) -> dict[str, Kept]:
    number = Counter(passage.source for passage in passages)
    held_number = Counter(passage.source for passage in held)
    characters: Counter[str] = Counter()
    for passage in passages:
        characters[passage.source] += len(passage.text)
    return {
        source: Kept(
            passages=number[source],
            characters=characters[source],
            held_out=held_number[source],
            touching=dropped[source, "touching"],
            repeating=dropped[source, "repeating"],
        )
        for source in WEIGHTS
        if number[source] or held_number[source]
    }


def _first(passages: Sequence[Passage], characters: int) -> list[Passage]:
    chosen: list[Passage] = []
    total = 0
    for passage in passages:
        total += len(passage.text)
        if total > characters:
            break
        chosen.append(passage)
    return chosen


def _jsonl(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
