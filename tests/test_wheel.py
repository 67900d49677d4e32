"""The content of a release: a source archive, a wheel built from it that runs every command elsewhere, and an SBOM."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pat_serve.version import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pat_serve", "training", "export", "server")
DISTRIBUTIONS = packages_distributions()
SCRIPTS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, since a build leaves folders beside its sources; the links lead to the copies of what they link to.
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=skip)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source")
    # `make dist` does the same: the archive first, and the wheel from its content.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(build, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that has the wheel; what it depends on is lent by this one."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next((venv / "lib").glob("python3.*/site-packages"))
    # Before the .pth file, else pip would find the editable install and call it done.
    install = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    # A plain path: it comes after this environment's own packages, and the .pth of the editable install is not read.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"pat_serve-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"pat_serve", f"pat_serve-{__version__}.dist-info"}
    # Every module, through the links too, and every file that is no module.
    shipped = {name for name in names if name.startswith("pat_serve/")}
    sources = {
        f"pat_serve/{path.relative_to(ROOT) if stage else path.relative_to(ROOT / 'pat_serve')}"
        for folder, stage in ((ROOT / "pat_serve", False), *((ROOT / name, True) for name in SOURCES[-3:]))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not (stage is False and _linked(path))
    }
    assert shipped == sources


def test_the_source_archive_has_no_links(wheel: Path) -> None:
    """The archive has the links' targets as files, so that it unpacks and builds wherever links do not."""
    with tarfile.open(wheel.parent / f"pat_serve-{__version__}.tar.gz") as archive:
        members = archive.getmembers()
    assert not [one.name for one in members if one.issym() or one.islnk()]
    names = {one.name.partition("/")[2] for one in members}
    assert {"LICENSE", "README.md", "pyproject.toml", "pat_serve/server/engine/online.py"} <= names


def _linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_helps(installed: Path, tmp_path: Path, script: str) -> None:
    assert {path.name for path in installed.glob("pat-*")} == set(SCRIPTS)
    done = subprocess.run([installed / script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "Example" in done.stdout or script == "pat-demo"


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    script = (
        "import pat_serve, importlib.metadata as m; print(pat_serve.__file__); "
        "print(sorted({e.group for e in m.distribution('pat-serve').entry_points}))"
    )
    done = subprocess.run(
        [installed / "python", "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    location, groups = done.stdout.splitlines()
    assert location.startswith(str(installed.parent))
    assert groups == "['console_scripts', 'vllm.endpoint_plugins', 'vllm.general_plugins']"


def test_what_is_imported_is_required(wheel: Path, tmp_path: Path) -> None:
    """The environment above lends every package; a user's has those that the wheel asks for."""
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    told = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    base = {canonicalize_name(one.name) for one in told if one.marker is None or one.marker.evaluate({"extra": ""})}
    extras = {canonicalize_name(one.name) for one in told}
    modules = {
        name: zipfile.ZipFile(wheel).read(name).decode()
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py")
    }
    # fastapi, uvicorn, vLLM, pydantic and datasets bring these; whoever trains with deepspeed brings deepspeed.
    brought = {"starlette", "httptools", "uvloop", "jinja2", "pydantic-core", "pyarrow", "deepspeed"}
    missing = {f"{name}: {one}" for name, text in modules.items() for one in imported(text) - extras - brought}
    assert not missing
    # These are the imports of any command before it reads its arguments.
    commands = sorted(f"pat_serve.cli.{name.removeprefix('pat-')}" for name in SCRIPTS)
    script = (
        f"import sys, importlib; [importlib.import_module(name) for name in {commands}]; "
        "print(*[name for name in sys.modules if name.split('.')[0] == 'pat_serve'])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    files = [name.replace(".", "/") for name in loaded.stdout.split()]
    texts = {name: modules.get(f"{name}.py") or modules[f"{name}/__init__.py"] for name in files}
    assert len(texts) > 10
    missing = {f"{name}: {one}" for name, text in texts.items() for one in imported(text, at_once=True) - base}
    assert not missing


def imported(text: str, *, at_once: bool = False) -> set[str]:
    """Distributions of the packages that a module imports; `at_once`: when it is itself imported."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif not (at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return {
        canonicalize_name(DISTRIBUTIONS.get(name, [name])[0])
        for name in found - sys.stdlib_module_names - {"pat_serve"}
    }
