"""The blocks of the documentation that a reader would type, and the marks that say how to run them.

A block is a fence, or lines indented by four spaces, whose first word is a command or whose fence says python. It is
run by tests/test_doc_blocks.py unless an HTML comment before it says otherwise; several may stand there:

    <!-- not run: REASON -->                 the whole block
    <!-- not run `pat-eval x`: REASON -->    lines that begin so
    <!-- slow -->                            it takes long or starts an engine: make test-all
    <!-- may exit 1, 3 -->                   these are outcomes too
    <!-- with `pat-serve --model pruned/` -->    a server that runs beside it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
_OURS = r"pat-(?:train|export|serve|bench|eval|demo|shapes)"
_COMMANDS = rf"(?:{_OURS}|make|curl|docker|kubectl|accelerate|lm_eval|pip|python|serve|ray)"
_TYPED = re.compile(rf"^(?:[A-Z_]+=\S* )*{_COMMANDS}(?= |$)")
_MARK = re.compile(r"^<!-- (not run|slow|may exit|with)(?: `([^`]+)`)?:? ?(.*?) ?-->$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of commands or Python on a page.

    Attributes:
        page: path of the page, relative to the root.
        line: number of the block's first line on the page.
        language: shell or python.
        text: the block without its indentation.
        marks: (kind, prefix or command, rest) of the comments before it.
    """

    page: str
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str, str], ...]

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def not_run(self) -> str:
        """The reason why nothing of it is run; empty if something is."""
        return next((rest for kind, prefix, rest in self.marks if kind == "not run" and not prefix), "")

    @property
    def slow(self) -> bool:
        return any(kind == "slow" for kind, _, _ in self.marks)

    @property
    def server(self) -> str:
        """Command line of a server that runs beside it; empty for none."""
        return next((prefix for kind, prefix, _ in self.marks if kind == "with"), "")

    @property
    def exit_codes(self) -> set[int]:
        """Exit codes that count as outcomes."""
        return {0} | {int(code) for kind, _, rest in self.marks if kind == "may exit" for code in rest.split(",")}

    def commands(self) -> list[str]:
        """The command lines that are run, each in one piece: a backslash or an indentation continues a line."""
        lines: list[str] = []
        for line in self.text.splitlines():
            if lines and (lines[-1].endswith("\\") or line.startswith(" ")):
                lines[-1] += "\n" + line
            elif line.strip():
                lines.append(line)
        left_out = [prefix for kind, prefix, _ in self.marks if kind == "not run" and prefix]
        assert all(any(line.startswith(prefix) for line in lines) for prefix in left_out), (self.name, left_out)
        return [line for line in lines if not any(line.startswith(prefix) for prefix in left_out)]


def blocks(page: Path) -> list[Block]:
    """Read all blocks of a page, in order.

    Raises:
        ValueError: no block follows a mark.
    """
    return blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


def blocks_of(content: str, page: str) -> list[Block]:
    """Read all blocks of a page's text; the errors are those of `blocks`."""
    lines = content.splitlines()
    found, marks, at = [], list[tuple[str, str, str]](), 0
    while at < len(lines):
        line, begun = lines[at], at
        if mark := _MARK.match(line):
            marks.append((mark[1], mark[2] or "", mark[3]))
            at += 1
            continue
        language, text = "", ""
        if line.startswith("```"):
            at = next(end for end in range(at + 1, len(lines)) if lines[end].startswith("```")) + 1
            text = "\n".join(lines[begun + 1 : at - 1])
            language = "python" if line == "```python" else "shell" if _TYPED.match(text) else ""
        elif line.startswith("    ") and line.strip() and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = "\n".join(one[4:] for one in lines[begun:at]).rstrip()
            language = "shell" if _TYPED.match(text) else ""
        else:
            at += 1
        if language:
            found.append(Block(page=page, line=begun + 1, language=language, text=text, marks=tuple(marks)))
        elif marks and line.strip():
            raise ValueError(f"{page}, line {begun}: a mark, and no block of commands after it")
        if line.strip():
            marks = []
    return found


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]
