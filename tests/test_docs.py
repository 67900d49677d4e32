"""What the documentation says can be typed: every flag of every command line in it exists, and the site builds."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from pat_serve.cli.app import new_app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = runpy.run_path(str(ROOT / "docs/hooks.py"))["COMMANDS"]
_WORDS = r"[^`\n|>\\]*"
_LINE = re.compile(rf"(?:^ *|`|\$ |&& )(pat-(?:train|export|serve|bench|eval|demo)\b{_WORDS}(?:\\\n{_WORDS})*)", re.M)


def flags_of(name: str) -> set[str]:
    """All flags of a command and its subcommands."""
    found = set()
    for command, module, function in COMMANDS:
        if command.split()[0] != name:
            continue
        source = importlib.import_module(module)
        app = getattr(source, "app", None)
        if function:
            app = new_app()
            app.command()(getattr(source, function))
        command_line = typer.main.get_command(app)
        for part in [command_line, *getattr(command_line, "commands", {}).values()]:
            found |= {flag for parameter in part.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return found | {"--help"}


def lines() -> list[tuple[str, str]]:
    return [(page.name, line.strip()) for page in PAGES for line in _LINE.findall(page.read_text(encoding="utf-8"))]


def test_there_are_lines_to_check() -> None:
    assert len(lines()) > 30
    assert any("--" in line for _, line in lines())


def test_every_flag_in_the_documentation_exists() -> None:
    known = {name: flags_of(name) for name in {command.split()[0] for command, _, _ in COMMANDS}}
    unknown = []
    for page, line in lines():
        words = shlex.split(line.replace("\\\n", " ").replace("...", "").replace("'", ""), comments=True)
        own = words[: words.index("--")] if "--" in words else words
        for word in own[1:]:
            flag = word.split("=")[0].rstrip(".,:;)")
            if re.fullmatch(r"--[a-z][a-z0-9-]+", flag) and flag not in known[words[0]]:
                unknown.append(f"{page}: {flag} in {line!r}")
    assert not unknown, "\n".join(unknown)


def test_a_page_stands_once_in_the_navigation() -> None:
    pages = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert len(pages) > 15
    assert sorted(pages) == sorted(set(pages))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "site/commands.html").read_text()
    for flag in ("--claim", "--kv-cache-gib", "--ratio"):
        assert flag in commands
    assert "apply_pat" in (tmp_path / "site/api.html").read_text()
