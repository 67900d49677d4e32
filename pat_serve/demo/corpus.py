"""Real text that is on every machine with Python: the language reference and the docstrings of the standard library.

The base model reads documentation; the instruction set asks for a function's first docstring sentence, given its
signature. Whole modules are held out from both texts.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.1
# Rows are short and of like length, since a batch is padded to its longest row.
MAX_SIGNATURE_CHARS = 72
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
PROMPT = "### Python\n{signature}\n### What it does\n"


@dataclass(frozen=True, kw_only=True)
class Documented:
    """A function or class with its signature and docstring."""

    module: str
    signature: str
    docstring: str

    @property
    def first_sentence(self) -> str | None:
        """Return the docstring's first sentence, if it is a plain one of reasonable length."""
        text = " ".join(self.docstring.split("\n\n", 1)[0].split())
        found = re.match(r"[A-Z][^.]{8,100}\.(?=\s|$)", text)
        return found[0] if found and text.isascii() else None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts that the demo trains on, and the texts that judge it."""

    base_texts: list[str]
    train_rows: list[dict[str, str]]
    held_out_rows: list[dict[str, str]]


def is_held_out(module: str) -> bool:
    """Tell whether a top-level module is held out: a hash of its name chooses the same tenth on every machine.

    With this salt those modules also hold about a tenth of the rows (without a salt, tkinter alone is a fifth).
    """
    digest = hashlib.sha256(f"h{module.split('.', 1)[0]}".encode()).digest()
    return digest[0] < HELD_OUT_SHARE * 256


def build_corpus(library: Path | None = None) -> Corpus:
    """Read the standard library's sources.

    Args:
        library: its folder; the running interpreter's when None.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found = list(documented(library))
    rows: dict[bool, dict[str, dict[str, str]]] = {True: {}, False: {}}
    for item in found:
        sentence = item.first_sentence
        if sentence and len(item.signature) <= MAX_SIGNATURE_CHARS:
            # The signature is the key, so an inherited or overloaded method counts once.
            row = {"prompt": PROMPT.format(signature=item.signature), "completion": sentence}
            rows[is_held_out(item.module)].setdefault(item.signature, row)
    held_out = {signature: row for signature, row in rows[True].items() if signature not in rows[False]}
    docstrings = [
        f"{item.signature}\n{inspect.cleandoc(item.docstring)}" for item in found if not is_held_out(item.module)
    ]
    return Corpus(
        base_texts=[*language_reference(), *docstrings],
        train_rows=list(rows[False].values()),
        held_out_rows=list(held_out.values()),
    )


def first_texts(texts: list[str], characters: int) -> list[str]:
    """Take texts from the start until they have the given number of characters."""
    chosen, total = [], 0
    for text in texts:
        if total >= characters:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def language_reference() -> list[str]:
    """Read the chapters of Python's language reference that `help()` shows; some distributions leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [str(text) for text in topics.values()]


def documented(library: Path) -> Iterator[Documented]:
    """Find every function and class with a docstring in a folder of sources, in the order of the files."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and deliberately broken samples
        module = ".".join(relative.with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield Documented(module=module, signature=_signature(node), docstring=docstring)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"
