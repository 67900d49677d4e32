"""CONTENTS.md: what the rows are made of, under which licences, and how what is measured was kept out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.ground.build import HELD_OUT_CHARACTERS, WEIGHTS, Ground
from benchmarks.ground.overlap import GRAM_WORDS, MOST_SHARING, REPEATED_SHARE
from pat_serve.files.atomic import write_json, write_text
from pat_serve.run.plan import file_sha256
from pat_serve.version import __version__

_OWN = {
    "articles": ("WikiText-2's validation split, from --wikitext2-valid", "CC BY-SA 3.0 (Wikipedia)"),
    "items": ("the training halves of multiple-choice items, from --items", "each data set's own"),
    "python": ("docstrings of the standard library and of installed packages", "PSF-2, and each package's own"),
    "answers": ("the model's own answers to prompts made of the other sources", "the model's and the sources'"),
}
_KEPT_OUT = f"""\
Nothing in the rows shares a sequence of {GRAM_WORDS} words (lower case, no punctuation) with a text that is kept out:
the files of --keep-out, question and options of every item in `items/`, and `heldout.txt`. Sequences of more than
{MOST_SHARING} kept-out texts are a task's wording and do not count. Items about one passage or sentence are all in
`items/` or all in the rows. A passage is left out as a repetition where more than {REPEATED_SHARE:.0%} of its sequences
were there before.

Files of --keep-out, of which hashes alone were made: {{files}}.
"""


def write_record(ground: Ground, out: Path, own_answers: dict[str, Any] | None) -> None:
    """Write CONTENTS.md, the packages' licences, and ground.json, which has the hash of every file.

    Args:
        ground: what was built.
        out: its folder; the other files are written.
        own_answers: model, prompts and answers of the instructions; None without them.
    """
    for package in ground.packages:
        if package.copyright:
            write_text(out / "licences" / f"{package.package.name}.copyright", package.copyright)
    write_text(out / "CONTENTS.md", _contents(ground, own_answers))
    files = [path for pattern in ("*.jsonl", "*.txt", "items/*.json") for path in sorted(out.glob(pattern))]
    write_json(
        out / "ground.json",
        {
            "pat_serve": __version__,
            "files": {path.relative_to(out).as_posix(): file_sha256(path) for path in files},
            "sources": {source: dataclasses.asdict(kept) for source, kept in ground.kept.items()},
            "packages": {
                package.package.name: {
                    "version": package.version,
                    "sha256": file_sha256(package.path),
                    "licenses": package.licenses,
                }
                for package in ground.packages
            },
            "own_answers": own_answers,
        },
    )


def _contents(ground: Ground, own_answers: dict[str, Any] | None) -> str:
    held = sum(len(passage.text) for passage in ground.held_out)
    lines = [
        "# What is in this folder",
        "",
        "`train.jsonl`: rows of text. `heldout.txt`, `heldout.jsonl`: text of documents that are in no row.",
        "`items/`: the held-out halves of the items, for `pat-eval --task-data`. `instructions.jsonl`: the model's own",
        "answers. `prompts.jsonl`: prompts made of the texts, none of them answered here. `mixed.jsonl`: rows of text",
        "and answers. A file is missing where its source was not given.",
        "",
        "Every beginning of a file has its sources in the shares of the table while all of them last.",
        "",
        "| source | share | passages | characters | held out | touch kept-out text | repeat others | text | licence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source, kept in ground.kept.items():
        text, license_name = _OWN.get(source) or _of_packages(ground, source)
        lines.append(
            f"| {source} | {WEIGHTS[source]:.2f} | {kept.passages:,} | {kept.characters:,} | {kept.held_out:,} | "
            f"{kept.touching:,} | {kept.repeating:,} | {text} | {license_name} |"
        )
    if own_answers is not None:
        text, license_name = _OWN["answers"]
        answers, characters = own_answers["answers"], own_answers["characters"]
        lines.append(
            f"| answers | {WEIGHTS['answers']:.2f} | {answers:,} | {characters:,} | {own_answers['held_out']:,} | | | "
            f"{text} | {license_name} |"
        )
    lines += ["", f"`heldout.txt` has {held:,} characters (at most {HELD_OUT_CHARACTERS:,}).", ""]
    if ground.packages:
        lines += ["| package | version | licences that its copyright file names |", "|---|---|---|"]
        lines += [
            f"| {package.package.name} | {package.version} | {', '.join(package.licenses)} |"
            for package in ground.packages
        ]
        lines += ["", "`licences/` has the packages' own files.", ""]
    names = ", ".join(f"{path.name} ({file_sha256(path)[:12]})" for path in ground.inputs.keep_out) or "none"
    return "\n".join(lines) + "\n" + _KEPT_OUT.format(files=names)


def _of_packages(ground: Ground, source: str) -> tuple[str, str]:
    names = [package.package.name for package in ground.packages if package.package.source == source]
    return "packages " + ", ".join(names), "see the packages"
