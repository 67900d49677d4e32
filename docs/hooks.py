"""mkdocs hooks: they make pages from files elsewhere in the tree, and turn the names of pages into links.

The start page is README.md. typer's own generator writes the page of commands from what `--help` shows.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Each line is a command, its module, and its function where the module holds one command.
COMMANDS = (
    ("pat-shapes", "pat_serve.cli.shapes", "shapes"),
    ("pat-train", "pat_serve.cli.train", "train"),
    ("pat-export", "pat_serve.cli.export", "export"),
    ("pat-export verify", "pat_serve.cli.verify", "verify"),
    ("pat-export card", "pat_serve.cli.card", "card"),
    ("pat-serve", "pat_serve.cli.serve", "serve"),
    ("pat-bench", "pat_serve.cli.bench", None),
    ("pat-eval", "pat_serve.cli.eval", "evaluate"),
    ("pat-eval law", "pat_serve.cli.law", "law"),
    ("pat-demo", "pat_serve.cli.demo", "demo"),
)
# typer adds these flags, and the commands do not have them.
_COMPLETION = re.compile(r"^\* `--(install|show)-completion`.*\n", re.M)
_PAGE = re.compile(r"`docs/([\w-]+)\.md`")
# GitHub takes lines after a paragraph for a list; mkdocs needs a blank line before the list.
_LIST = re.compile(r"^(?![-*] |\d+\. |\s|\||#|$)(.*)\n(?=[-*] )", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "commands.md": "# Commands\n\n" + "\n".join(map(_chapter, COMMANDS)),
        "recipes.md": _recipes(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn the names of pages into links to them."""
    linked = _PAGE.sub(
        lambda name: f"[`docs/{name[1]}.md`]({name[1]}.md)" if files.src_uris.get(f"{name[1]}.md") else name[0],
        markdown,
    )
    # README's links and pictures start at the root of the tree.
    linked = linked.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")
    return _LIST.sub(r"\1\n\n", linked)


def _chapter(command: tuple[str, str, str | None]) -> str:
    """A command's help; with that of pat-train the settings that a method has for itself."""
    return _help(*command) + (_methods() if command[0] == "pat-train" else "")


def _help(command: str, module: str, function: str | None) -> str:
    chosen = ["--func", function] if function else []
    typer = [sys.executable, "-m", "typer", *chosen, module, "utils", "docs", "--name", command]
    done = subprocess.run(typer, capture_output=True, text=True, check=True, cwd=ROOT)
    # Headings go one level down, since each command is a chapter of the page.
    return _COMPLETION.sub("", re.sub(r"^(#+ )", r"#\1", done.stdout, flags=re.M))


def _recipes() -> str:
    texts = [
        "# Recipes by family and size\n",
        "`pat-train --config recipes/NAME.yaml --data train.jsonl --out run/`:\n",
    ]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        texts.append(f"## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(texts)


def _methods() -> str:
    """The settings that each method has for itself, from their classes."""
    from pat_serve.cli.method_flags import default_of
    from pat_serve.training.methods import METHODS

    lines = []
    for method in METHODS.values():
        if fields := method.settings.model_fields:
            lines.append(f"\n### `pat-train --method {method.name}`\n")
            lines += [
                f"* `--{name.replace('_', '-')}`: {field.description}{default_of(field)}"
                for name, field in fields.items()
            ]
    return "\n".join(lines) + "\n"
