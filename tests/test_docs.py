"""All that the documentation names exists: flags, files, folders of the tree. And the site builds."""

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
# A name in backticks that begins with a folder of the repository is a path of it.
_PATH = re.compile(
    r"`((?:pat_serve|training|export|server|tests|benchmarks|configs|deploy|docker|docs|examples|monitoring|recipes|"
    r"requirements)/[\w./-]*)(?:::\w+)?`"
)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)")
README_LINES = 120
_LINE = re.compile(
    rf"(?:^ *|`|\$ |&& )(pat-(?:train|export|serve|bench|eval|demo|shapes)\b{_WORDS}(?:\\\n{_WORDS})*)", re.M
)


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
    if name == "pat-train":
        from pat_serve.training.methods import METHODS

        settings = {setting for method in METHODS.values() for setting in method.settings.model_fields}
        found |= {f"--{setting.replace('_', '-')}" for setting in settings}
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


def tree_of(text: str) -> set[str]:
    """Folders of the annotated tree, which is the first block of text: two spaces of indentation a level."""
    block = re.search(r"^```text\n(.*?)^```", text, re.M | re.S)
    assert block, "no tree"
    folders: set[str] = set()
    above: list[str] = []
    for line in block[1].splitlines():
        entry = re.fullmatch(r"((?:  )*)([\w.]+)/ +\S.*", line)
        assert entry, f"not a folder with its meaning: {line!r}"
        level = len(entry[1]) // 2
        assert level <= len(above), f"indented too far: {line!r}"
        above[level:] = [entry[2]]
        assert "/".join(above) not in folders, f"twice: {line!r}"
        folders.add("/".join(above))
    return folders


def package_folders() -> set[str]:
    """Every folder of the repository that holds Python, and all of its folders at the top but hidden and made ones."""
    tops = {"pat_serve", "training", "export", "server", "tests", "benchmarks"}
    found = set(tops)
    for top in tops:
        for path in (ROOT / top).rglob("*.py"):
            inside = path.parent.relative_to(ROOT)
            links = (parent for parent in inside.parents if (ROOT / parent).is_symlink())
            if not (ROOT / inside).is_symlink() and not any(links):
                found |= {str(folder) for folder in (inside, *inside.parents) if folder != Path()}
    return found


def test_every_package_folder_has_its_line_in_the_tree() -> None:
    lines = tree_of((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(package_folders()) > 40
    assert not package_folders() - lines, "folders without a line"
    assert not {line for line in lines if not (ROOT / line).is_dir()}, "lines without a folder"


def test_a_tree_is_read_with_its_levels() -> None:
    text = "```text\na/      one\n  b/    two\n    c/  three\nd/      four\n```\n"
    assert tree_of(text) == {"a", "a/b", "a/b/c", "d"}
    for wrong in ("a/  one\n    c/  too far\n", "a/\n", "a/  one\na/  again\n"):
        with pytest.raises(AssertionError):
            tree_of(f"```text\n{wrong}```\n")


def test_every_path_in_the_documentation_exists() -> None:
    paths = [(page.name, path) for page in PAGES for path in _PATH.findall(page.read_text(encoding="utf-8"))]
    assert len(paths) > 100
    assert not [f"{page}: {path}" for page, path in paths if not (ROOT / path).exists()]


def test_a_way_through_the_code_counts_its_files() -> None:
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    ways = re.findall(r"^\| \w+: [^|]+ \| (\d+) \| (.* → .*) \|$", page, re.M)
    assert len(ways) == 4
    assert [int(count) for count, _ in ways] == [len(set(_PATH.findall(files))) for _, files in ways]


def test_every_link_leads_to_a_file() -> None:
    links = [(page, link) for page in PAGES for link in _LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 20
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).is_file()]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_LINES


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "site/commands.html").read_text()
    for flag in ("--claim", "--kv-cache-gib", "--ratio"):
        assert flag in commands
    assert "apply_pat" in (tmp_path / "site/api.html").read_text()
