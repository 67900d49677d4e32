"""More text for a larger base: the docstrings of every package that is installed beside the interpreter.

    python -m benchmarks.study.package_docs --out texts.jsonl.gz
    python -m benchmarks.study --size large --more texts.jsonl.gz ...

The locked environment's packages hold some 70 million characters, mostly English. They leave out modules of a
held-out name, and every docstring that quotes a held-out sentence.
"""

from __future__ import annotations

import gzip
import inspect
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.demo.corpus import build_corpus, documented, is_held_out

LEAST_CHARACTERS = 80


def collect(packages: Path, held_out: Iterable[str]) -> Iterator[str]:
    """Each docstring once, under its signature, in the order of the files.

    Args:
        packages: a folder of installed packages.
        held_out: sentences that none may quote.
    """
    held_out, seen = list(held_out), set()
    for item in documented(packages):
        text = f"{item.signature}\n{inspect.cleandoc(item.docstring)}"
        if len(text) < LEAST_CHARACTERS or is_held_out(item.module) or hash(text) in seen:
            continue
        seen.add(hash(text))
        flat = " ".join(text.split())
        if not any(sentence in flat for sentence in held_out):
            yield text


def read(path: Path) -> list[str]:
    """Read the docstrings that `main` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main(
    out: Annotated[Path, typer.Option(help="Gzipped JSON lines, a string each.")],
    packages: Annotated[Path | None, typer.Option(help="Folder of packages; this interpreter's when left out.")] = None,
) -> None:
    """Write the docstrings of installed packages."""
    held_out = [row["completion"] for row in build_corpus().held_out_rows]
    count = characters = 0
    with gzip.open(out, "wt", encoding="utf-8") as file:
        for text in collect(packages or Path(sysconfig.get_paths()["purelib"]), held_out):
            file.write(json.dumps(text) + "\n")
            count, characters = count + 1, characters + len(text)
    typer.echo(f"{out}: {count:,} docstrings, {characters:,} characters")


if __name__ == "__main__":
    typer.run(main)
