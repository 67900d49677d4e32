"""The stages import the core and never each other; vLLM has one room; --help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("training", "export", "server")
# The others are parts of a command.
PARTS = ("app", "eval_data", "quality_gate")
COMMANDS = sorted(path.stem for path in (ROOT / "pat_serve/cli").glob("[a-z]*") if path.stem not in PARTS)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def core_files() -> list[Path]:
    core = ROOT / "pat_serve"
    others = (*STAGES, "cli", "demo")
    return [path for path in core.rglob("*.py") if path.relative_to(core).parts[0] not in others]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_linked_into_the_package(stage: str):
    link = ROOT / "pat_serve" / stage
    assert link.is_symlink()
    assert link.readlink() == Path("..") / stage


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str):
    others = tuple(f"pat_serve.{other}" for other in (*STAGES, "cli", "demo") if other != stage)
    for path in (ROOT / stage).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(others), f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_imports_no_stage():
    stages = tuple(f"pat_serve.{stage}" for stage in (*STAGES, "cli", "demo"))
    for path in core_files():
        for name in imports(path):
            assert not name.startswith(stages), f"{path.relative_to(ROOT)} imports {name}"


def test_bare_stage_names_are_never_imported():
    for folder in ("pat_serve/cli", "pat_serve/demo", *STAGES, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports(path):
                assert name.split(".")[0] not in STAGES, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("package", "room"), [("vllm", "server/engine/"), ("ray", "server/cluster/app.py")])
def test_it_is_imported_in_one_room(package: str, room: str):
    assert core_files()
    files = [*core_files(), *(ROOT / "pat_serve/cli").rglob("*.py"), *(ROOT / "pat_serve/demo").rglob("*.py")]
    for stage in STAGES:
        files += (ROOT / stage).rglob("*.py")
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert importers
    assert [path for path in importers if not path.startswith(room)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command: str):
    """A subprocess, since this one has torch already."""
    script = (
        "import sys\n"
        f"sys.argv = ['pat-{command}', '--help']\n"
        f"from pat_serve.cli.{command} import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
