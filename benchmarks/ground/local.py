"""Texts that lie on this machine: articles and items of folders that the caller names, and Python's documentation."""

from __future__ import annotations

import inspect
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground.passages import Document, draw
from pat_serve.demo.corpus import documented, is_held_out, language_reference
from pat_serve.errors import DataError, first_line
from pat_serve.evaluation.paper14.local_items import parse_prompt
from pat_serve.files.strict_json import parse
from pat_serve.files.text_files import read_utf8

_TITLE = re.compile(r" = [^=].*[^=] = ")
# WikiText-2 has the marks of its tokenization: " @-@ " is a hyphen, and a blank stands before a comma.
_WIKITEXT = ((re.compile(r" @([-,.])@ "), r"\1"), (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
             (re.compile(r"([(\[]) "), r"\1"), (re.compile(r" '(s|t|re|ve|ll|d|m)\b"), r"'\1"))  # fmt: skip
# A shorter docstring is a remark.
_LEAST_CHARACTERS = 80
# A line that so many of a task's items share is the task's wording.
_WORDING_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Items:
    """Both halves of the items.

    Attributes:
        trained: each item written out with its right option, a document each.
        measured: content of the files that pat-eval's --task-data reads, by file name.
    """

    trained: list[Document]
    measured: dict[str, dict[str, dict[str, str]]]

    def measured_texts(self) -> Iterator[str]:
        """Question and each option of every measured item, without the lines that are the task's wording."""
        for items in self.measured.values():
            questions = [parse_prompt(item["origin_prompt"], item["gold"]) for item in items.values()]
            wording = _wording([question.stem for question in questions])
            for question in questions:
                yield " ".join(line for line in question.stem.split("\n") if line not in wording)
                yield from question.options


def articles(path: Path, *, cleaned: bool = True) -> list[Document]:
    """Read a WikiText file, a document for each article.

    Args:
        path: the raw file, or the variant with `<unk>`.
        cleaned: undo the tokenization, so that the text reads like other text.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = read_utf8(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            path, expected="a text file in UTF-8", found=first_line(error), fix="Give WikiText-2's validation file."
        ) from error
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if _TITLE.fullmatch(line.rstrip("\n")) or not found:
            found.append((line.strip(" ="), []))
        elif line.strip() and not line.startswith(" ="):
            found[-1][1].append(_clean(line.strip()) if cleaned else line.strip())
    return [
        Document(source="articles", name=title, paragraphs=tuple(paragraphs))
        for title, paragraphs in found
        if paragraphs
    ]


def items(folder: Path) -> Items:
    """Read files of multiple-choice items and part each task in halves.

    Items about the same passage, fact or sentence go to the same half. A hash of it decides, so the halves are the same
    on every machine.

    Args:
        folder: JSON files that map a number to `origin_prompt` and `gold`.

    Raises:
        DataError: there is no such file, or one has another form.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(folder, expected="JSON files of items", found="none", fix="Check --items.")
    trained: list[Document] = []
    measured: dict[str, dict[str, dict[str, str]]] = {}
    for path in paths:
        found = _read(path)
        subjects = _subjects([item["origin_prompt"] for item in found.values()])
        for number, item in found.items():
            prompt, gold = item["origin_prompt"], item["gold"]
            if draw("items", subjects[prompt]) < 0.5:
                # The files may hold a model's prediction too, which is not copied.
                measured.setdefault(path.name, {})[number] = {"origin_prompt": prompt, "gold": gold}
                continue
            question = parse_prompt(prompt, gold)
            text = f"{question.cloze} {question.options[question.gold]}"
            trained.append(Document(source="items", name=f"{path.stem} {number}", paragraphs=(text,)))
    return Items(trained=trained, measured=measured)


def documentation(characters: int, libraries: list[Path] | None = None) -> list[Document]:
    """Python's language reference, and the docstrings of the standard library and of installed packages.

    A module's docstrings are one document. Modules that the demo holds out are left out here too.

    Args:
        characters: where to stop; reading every package of a large environment takes minutes.
        libraries: folders of sources; when None, the library and the packages of the interpreter, by hashes of their
            names.
    """
    if libraries is None:
        paths = sysconfig.get_paths()
        packages = (path for path in Path(paths["purelib"]).iterdir() if (path / "__init__.py").is_file())
        libraries = [Path(paths["stdlib"]), *sorted(packages, key=lambda path: draw("python", path.name))]
    modules: dict[str, list[str]] = {}
    total = 0
    for library in libraries:
        if total >= characters:
            break
        # A package's modules are told by its name, the library's by their own.
        top = f"{library.name}." if (library / "__init__.py").is_file() else ""
        if top and is_held_out(top):
            continue
        for item in documented(library):
            text = inspect.cleandoc(item.docstring)
            if len(text) >= _LEAST_CHARACTERS and text.isascii() and (top or not is_held_out(item.module)):
                modules.setdefault(f"{top}{item.module}", []).append(f"{item.signature}\n{text}")
                total += len(text)
    reference = [("reference", number, text) for number, text in enumerate(language_reference())]
    return [
        *(Document(source="python", name=f"{name} {number}", paragraphs=tuple(text.strip().split("\n\n")))
          for name, number, text in reference),
        *(Document(source="python", name=name, paragraphs=tuple(texts)) for name, texts in modules.items()),
    ]  # fmt: skip


def _clean(text: str) -> str:
    for pattern, replacement in _WIKITEXT:
        text = pattern.sub(replacement, text)
    return text


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        found = parse(path.read_bytes())
        for item in found.values():
            parse_prompt(item["origin_prompt"], item["gold"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            path,
            expected="a JSON object of items with an origin_prompt and a gold letter",
            found=first_line(error),
            fix="Remove it from the folder of --items, or mend it.",
        ) from error
    return json.loads(json.dumps(found))


def _subjects(prompts: list[str]) -> dict[str, str]:
    """The subject of each item: its first line that is not the wording of the task."""
    wording = _wording(prompts)
    return {prompt: next((line for line in prompt.split("\n") if line not in wording), prompt) for prompt in prompts}


def _wording(prompts: list[str]) -> set[str]:
    """Lines of the task's own, which say nothing of an item."""
    lines = Counter(line for prompt in prompts for line in set(prompt.split("\n")))
    return {line for line, count in lines.items() if count > max(1, len(prompts) * _WORDING_SHARE)}
