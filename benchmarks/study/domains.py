"""Other texts for the study, of which every machine has the first and many the second.

`code`: the base reads what it reads in the study (documentation, articles), and is tuned on function bodies of the
standard library: a domain that it has not seen. `languages`: base and tuning are the messages of the machine's
programs in several languages, from the gettext catalogues in /usr/share/locale (of a Debian or Ubuntu that was not
stripped of them, as container images often are). Packages from an index bring none: their catalogues name countries.
"""

from __future__ import annotations

import ast
import gettext
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.study.corpus import Corpus, build
from pat_serve.demo.corpus import first_texts, is_held_out
from pat_serve.errors import UsageError

DOMAINS = ("code", "languages")

# Characters of a function's body, and of a message; a row is cut at 128 tokens.
CODE_CHARACTERS = (80, 500)
MESSAGE_CHARACTERS = (25, 400)
HELDOUT_CODE_CHARACTERS = 60_000
HELDOUT_ROWS = 300
MESSAGES_A_ROW = 3
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}

CATALOGUES = Path("/usr/share/locale")
# Five scripts' worth of differences, and English, which all of them were translated from.
LANGUAGES = ("de", "es", "fr", "ja", "ru")
ENGLISH = "en"
# Every language has as many, so that none outweighs the others: for base and tuning together, and for the measures.
TRAINED_CHARACTERS = 400_000
HELDOUT_CHARACTERS = 25_000
# Less is no corpus.
LEAST_CHARACTERS = 500_000


def build_domain(name: str, data: Path | None, seed: int = 0) -> Corpus:
    """The corpus of a domain.

    Args:
        name: of DOMAINS.
        data: as for `corpus.build`; `languages` makes no use of it.
        seed: of the split.

    Raises:
        UsageError: the texts are not on this machine.
    """
    return code(build(data, seed), seed) if name == "code" else languages(seed)


def code(general: Corpus, seed: int = 0, library: Path | None = None) -> Corpus:
    """The general base, tuned on function bodies; whole modules are held out, those whose docstrings are too.

    Args:
        general: what the base reads, and held-out texts of which are measured too: what the tuning forgets.
        seed: of the order.
        library: Python's standard library; the running interpreter's when None.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    rows: dict[bool, dict[str, dict[str, str]]] = {True: {}, False: {}}
    for module, head, body in _functions(library):
        rows[is_held_out(module)].setdefault(body, {"prompt": f"{head}\n", "completion": body})
    shuffler = random.Random(seed)
    tune = list(rows[False].values())
    held = [row for body, row in rows[True].items() if body not in rows[False]]
    for each in (tune, held):
        shuffler.shuffle(each)
    text = "\n\n".join(row["prompt"] + row["completion"] for row in held)[:HELDOUT_CODE_CHARACTERS]
    return replace(
        general,
        tune_rows=tune,
        heldout_rows=held[:HELDOUT_ROWS],
        heldout_texts={**general.heldout_texts, "code": text},
        heldout_items={},
    )


def _functions(library: Path) -> Iterator[tuple[str, str, str]]:
    """Module, first line and body of every function of a fitting length; a body begins after its docstring."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines, module = text.splitlines(), ".".join(relative.with_suffix("").parts)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            if not statements:
                continue
            body = textwrap.dedent("\n".join(lines[statements[0].lineno - 1 : node.end_lineno]))
            if CODE_CHARACTERS[0] <= len(body) <= CODE_CHARACTERS[1]:
                yield module, f"def {node.name}({ast.unparse(node.args)}):", textwrap.indent(body, "    ")


def languages(seed: int = 0, catalogues: Path = CATALOGUES, least_characters: int = LEAST_CHARACTERS) -> Corpus:
    """Messages in several languages, in equal parts: half for the base, half to tune on.

    Held out are the messages of whole programs, the same ones in every language: what is measured in one language was
    not read in another.

    Args:
        seed: of the order.
        catalogues: folder of `LANGUAGE/LC_MESSAGES/PROGRAM.mo`.
        least_characters: of what is trained on, all languages together.

    Raises:
        UsageError: there is less.
    """
    shuffler = random.Random(seed)
    base: list[str] = []
    tune: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    texts: dict[str, str] = {}
    trained = 0
    for language, (train, kept) in _messages(catalogues).items():
        for each in (train, kept):
            shuffler.shuffle(each)
        chosen = first_texts(train, TRAINED_CHARACTERS)
        trained += sum(map(len, chosen))
        half = len(chosen) // 2
        base += chosen[:half]
        tune += _rows(language, chosen[half:])
        held += _rows(language, kept)[: HELDOUT_ROWS // (len(LANGUAGES) + 1)]
        texts[language] = "\n\n".join(first_texts(kept, HELDOUT_CHARACTERS))
    if trained < least_characters:
        raise UsageError(
            f"--domain languages: {catalogues}",
            expected=f"at least {least_characters:,} characters of messages in {', '.join(LANGUAGES)}",
            found=f"{trained:,}",
            fix="Run it where the distribution's message catalogues are installed; no package brings them.",
        )
    for rows in (base, tune):
        shuffler.shuffle(rows)
    return Corpus(base_texts=base, tune_rows=tune, heldout_rows=held, heldout_texts=texts, heldout_items={})


def _messages(catalogues: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By language the messages to train on, and those of the programs that are held out."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {ENGLISH: ({}, {})}
    for language in LANGUAGES:
        own = found.setdefault(language, ({}, {}))
        for path in sorted((catalogues / language / "LC_MESSAGES").glob("*.mo")):
            # Names of countries, currencies and languages.
            if path.name.startswith("iso_"):
                continue
            side = _is_held_out_program(path.stem)
            for english, translated in _catalogue(path):
                for sink, message in ((own, translated), (found[ENGLISH], english)):
                    if MESSAGE_CHARACTERS[0] <= len(message) <= MESSAGE_CHARACTERS[1]:
                        sink[side].setdefault(message)
    # Programs share messages.
    return {
        language: (list(train), [message for message in kept if message not in train])
        for language, (train, kept) in found.items()
    }


def _catalogue(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            # Public calls look messages up and list none; babel's reader, which lists them, stops at a malformed date.
            pairs: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]  # not stubbed
    except (OSError, UnicodeDecodeError):
        # A few old ones do not say what they are encoded in.
        return
    for key, message in pairs.items():
        # A plural has a key for each of its forms, and its own English in none but the first.
        english = key[0] if isinstance(key, tuple) else key
        if isinstance(english, str) and english:
            # Before it, what the message is about, for the translator.
            yield english.rsplit("\x04", 1)[-1], message


def _is_held_out_program(name: str) -> bool:
    """About a sixth of the catalogues, the same ones on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] < 43


def _rows(language: str, messages: list[str]) -> list[dict[str, str]]:
    """A message alone would fill a quarter of a row."""
    groups = (messages[at : at + MESSAGES_A_ROW] for at in range(0, len(messages), MESSAGES_A_ROW))
    return [{"prompt": f"### {language}\n", "completion": "\n".join(group)} for group in groups]
