"""The stages import the core and never each other; vLLM has one room; --help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("training", "export", "server")
# The others are parts of a command.
PARTS = ("app", "calibration", "method_flags", "eval_data", "quality_gate")
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


def importers_of(files: Iterable[Path], names: tuple[str, ...]) -> list[str]:
    """Files that import one of these modules or a part of one, each with what it imports."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if any(name == one or name.startswith(f"{one}.") for one in names)
    ]


def test_the_engine_knows_no_http():
    """Nor anything else of the server but pure mathematics, so that every command can start one."""
    files = list((ROOT / "server/engine").rglob("*.py"))
    assert importers_of(files, ("vllm",)) != []
    rooms = tuple(f"pat_serve.server.{room}" for room in ("http", "routes", "start", "cluster", "bench"))
    assert importers_of(files, (*rooms, "fastapi", "starlette", "uvicorn", "http.client")) == []


def test_what_serves_users_imports_nothing_of_the_benchmarks():
    """Two files of the routes answer with a benchmark's result, and import what makes one."""
    rooms = ("start", "http", "engine", "cluster", "routes")
    files = [path for room in rooms for path in (ROOT / "server" / room).rglob("*.py")]
    answers = [path for path in files if path.name in ("live_speedup.py", "speedup_request.py")]
    assert len(answers) == 2
    bench = ("pat_serve.server.bench",)
    assert importers_of(answers, bench) != []
    assert importers_of((path for path in files if path not in answers), bench) == []


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_the_evaluation(stage: str):
    """Scores of tasks are made by `pat-eval`; a stage that wants some is given them by its command."""
    files = list((ROOT / stage).rglob("*.py"))
    assert len(files) > 10
    assert importers_of(files, ("pat_serve.evaluation",)) == []


def test_a_worker_process_loads_no_web_framework():
    """A subprocess, since this one has it already. vLLM itself loads what it likes, once an engine starts."""
    script = (
        "import sys\n"
        "import pat_serve.server.engine.workers.worker\n"
        "loaded = {'fastapi', 'starlette', 'uvicorn'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
