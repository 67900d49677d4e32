"""The SBOM of the locks: this package as its root, every locked package with its hashes, and the graph between them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pat_serve.version import __version__

ROOT = Path(__file__).parents[1]
LOCK = f"""\
one==1.0 \\
    --hash=sha256:{"1" * 64} \\
    --hash=sha256:{"2" * 64}
    # via
    #   -c requirements/cpu.lock
    #   pat-serve (pyproject.toml)
    #   two
two[extra]==2.0+cpu \\
    --hash=sha256:{"3" * 64}
    # via pat-serve (pyproject.toml)
three==3.0 ; sys_platform == 'linux' \\
    --hash=sha256:{"4" * 64}
    # via two
"""


def sbom(folder: Path, *locks: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "requirements/sbom.py"), *map(str, locks), "--out", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)


def needs(bom: dict[str, Any]) -> dict[str, list[str]]:
    return {one["ref"]: one["dependsOn"] for one in bom["dependencies"]}


def test_packages_hashes_and_graph(tmp_path: Path) -> None:
    (tmp_path / "small.lock").write_text(LOCK)
    done = sbom(tmp_path / "dist", tmp_path / "small.lock")
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"dist/pat-serve-{__version__}-small.cdx.json"
    bom = json.loads(path.read_text())
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    root = bom["metadata"]["component"]
    assert (root["name"], root["version"], root["type"]) == ("pat-serve", __version__, "application")
    assert root["licenses"][0]["license"]["id"] == "Apache-2.0"
    assert {(one["name"], one["version"]) for one in bom["components"]} == {
        ("one", "1.0"),
        ("two", "2.0+cpu"),
        ("three", "3.0"),
    }
    [one] = [component for component in bom["components"] if component["name"] == "one"]
    assert one["purl"] == "pkg:pypi/one@1.0"
    assert [h["content"] for ref in one["externalReferences"] for h in ref["hashes"]] == ["1" * 64, "2" * 64]
    assert needs(bom) == {"pat-serve": ["one", "two"], "two": ["one", "three"], "one": [], "three": []}


def test_a_lock_whose_comments_name_what_it_does_not_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.lock").write_text(LOCK + "    #   absent\n")
    done = sbom(tmp_path / "dist", tmp_path / "small.lock")
    assert done.returncode == 1
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "dist").iterdir())


@pytest.mark.slow
def test_the_images_locks(tmp_path: Path) -> None:
    """Every locked package is in it, needed by the root in some way; the same lock gives the same bytes."""
    done = sbom(tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert sbom(tmp_path / "again", ROOT / "requirements/serve-cpu.lock").returncode == 0
    [again] = (tmp_path / "again").iterdir()
    assert again.read_bytes() == (tmp_path / "dist" / again.name).read_bytes()
    for name in ("serve-cpu", "serve-cuda"):
        bom = json.loads((tmp_path / f"dist/pat-serve-{__version__}-{name}.cdx.json").read_text())
        lock = (ROOT / f"requirements/{name}.lock").read_text()
        pinned = set(re.findall(r"^([a-z0-9][\w.-]*)(?:\[.*?\])?==", lock, re.M))
        assert {one["name"] for one in bom["components"]} == pinned
        graph, reached, left = needs(bom), set[str](), ["pat-serve"]
        while left:
            reached.add(one := left.pop())
            left += [need for need in graph[one] if need not in reached]
        assert reached == {"pat-serve", *pinned}
