"""Write the parts of a release as CycloneDX: one file for each lock that the images install.

    python requirements/sbom.py --out dist/

cyclonedx-py reads a lock's packages and hashes. This script adds what cyclonedx-py cannot know: this package's version
as the root, and who needs whom, from the lock's own "via" comments. The result is checked against the schema before it
is written. Without SOURCE_DATE_EPOCH it has no date, and the same lock gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements/serve-cpu.lock", "requirements/serve-cuda.lock")
_PINNED = re.compile(r"^([a-z0-9][a-z0-9._-]*)(?:\[[^]]*\])?==(\S+)")
# A line with two spaces more than "# via" itself is one of several.
_VIA = re.compile(r"^    #(?: via|  ) +(?!-[a-z] )([a-z0-9][a-z0-9._-]*)")


def main() -> None:
    """Write the files, or end with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", type=Path, nargs="*", default=[ROOT / lock for lock in LOCKS])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for lock in options.locks:
        bom = complete(generate(lock), lock.read_text(encoding="utf-8"), version())
        text = json.dumps(bom, indent=2, sort_keys=True) + "\n"
        validate(text, lock)
        path = options.out / f"pat-serve-{version()}-{lock.stem}.cdx.json"
        path.write_text(text, encoding="utf-8")
        print(f"sbom: {len(bom['components'])} packages in {path}")


def version() -> str:
    """Read this package's version without importing the package."""
    namespace: dict[str, str] = {}
    exec((ROOT / "pat_serve/version.py").read_text(encoding="utf-8"), namespace)
    return namespace["__version__"]


def generate(lock: Path) -> dict[str, Any]:
    """List the lock's packages with their hashes."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(lock), "--pyproject", "pyproject.toml"]
    command += ["--mc-type", "application", "--output-reproducible", "--no-validate", "-o", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"sbom: {lock}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def complete(bom: dict[str, Any], lock: str, own_version: str) -> dict[str, Any]:
    """Add the root's version and the graph, and name each package by what it is."""
    root = bom["metadata"]["component"]
    root |= {"version": own_version, "purl": f"pkg:pypi/pat-serve@{own_version}", "bom-ref": "pat-serve"}
    for component in bom["components"]:
        component["bom-ref"] = component["name"]
        # This property repeats the requirement's line with its hashes, which are recorded already.
        component.pop("description", None)
    needs = graph(lock)
    unknown = {name for name, _ in needs} | {need for _, need in needs}
    unknown -= {component["name"] for component in bom["components"]} | {"pat-serve"}
    if unknown:
        raise SystemExit(f"sbom: expected every package of the graph in the lock, found none of {sorted(unknown)}")
    refs = ["pat-serve", *(component["name"] for component in bom["components"])]
    bom["dependencies"] = [
        {"ref": ref, "dependsOn": sorted({need for name, need in needs if name == ref})} for ref in sorted(refs)
    ]
    return bom


def graph(lock: str) -> set[tuple[str, str]]:
    """Pairs (who, needs whom) of a lock with "via" comments, as uv and pip-compile write them."""
    pairs, current = set(), ""
    for line in lock.splitlines():
        if pinned := _PINNED.match(line):
            current = pinned[1]
        elif via := _VIA.match(line):
            pairs.add((via[1], current))
    return pairs


def validate(text: str, lock: Path) -> None:
    """Refuse a document that is no CycloneDX 1.6."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        raise SystemExit(f"sbom: {lock}: not valid: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
