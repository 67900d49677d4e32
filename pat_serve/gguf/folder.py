"""Write the plain folder of a GGUF file once into a cache, under the file's SHA-256."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import yaml

from pat_serve.errors import DiskFull, UsageError
from pat_serve.files.atomic import new_folder, write_json
from pat_serve.machine.extras import require
from pat_serve.terminal.progress import byte_progress, say

# The folder holds this beside the model. It names the file that was read.
PROVENANCE = "pat_gguf.json"
# The version rises when the same GGUF file would give other files.
_READER = 2
_PIECE_BYTES = 1 << 22
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def folder_of(path: Path) -> Path:
    """Find the plain folder of a GGUF file, and write it if it is not there yet.

    Several processes may ask at once: one writes, the others wait.

    Raises:
        MissingExtra: the gguf package is not there.
        BrokenCheckpoint: the file is no GGUF file or is damaged.
        UnsupportedModel: the architecture, a setting, a type or the tokenizer is not covered.
        DiskFull: the folder does not fit beside the others.
        UsageError: the cache's folder cannot be written.
    """
    require("gguf", "gguf", wanted_by=str(path))
    # The link keeps its name, because a hub's cache keeps its target under a hash.
    path = path.parent.resolve() / path.name
    cache = _cache()
    known = _known(cache, path)
    if known is not None and (found := _finished(cache, known)) is not None:
        return found
    from pat_serve.gguf.header import read_header
    from pat_serve.gguf.weights import stored_dtype

    # A file is refused before gigabytes of it are read.
    parts = _Parts(read_header(path))
    with _writable(cache):
        sha256 = known or _hash(cache, path)
        dtype = str(stored_dtype(parts.header)).removeprefix("torch.")
        target = cache / f"{sha256}-{dtype}-{_READER}"
        with _locked(cache / f"{sha256}.lock"):
            if not _whole(target):
                _write(parts, target, sha256)
    return target


def sha256_of_folder(folder: Path) -> str | None:
    """SHA-256 of the GGUF file that a folder was read from; None for any other folder."""
    try:
        value = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


class _Parts:
    """A file's config, tokenizer and list of tensors: everything except the weights."""

    def __init__(self, header: Any) -> None:
        from pat_serve.checkpoints.recognize import family_of
        from pat_serve.gguf.config import ROPE_FREQUENCIES, config_of, family_of_header, generation_config_of
        from pat_serve.gguf.tokenizer import tokenizer_of
        from pat_serve.gguf.weights import read_rows, stock_tensors

        self.header = header
        self.family = family_of_header(header)
        self.config = config_of(header, lambda: read_rows(header, header.tensors[ROPE_FREQUENCIES]))
        # A narrower model of the family cannot keep these settings.
        family_of(self.config, header.path)
        self.generation_config = generation_config_of(header)
        self.tensors = stock_tensors(header, self.family, self.config)
        self.tokenizer = tokenizer_of(header)


def _write(parts: _Parts, target: Path, sha256: str) -> None:
    from pat_serve.checkpoints.checkpoint import open_checkpoint
    from pat_serve.gguf.tokenizer import require_loadable
    from pat_serve.gguf.weights import stored_dtype, write_weights

    header, dtype = parts.header, stored_dtype(parts.header)
    kinds = sorted({tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1})
    needed = sum(prod(tensor.shape) for tensor in parts.tensors) * dtype.itemsize
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DiskFull(
            target.parent,
            expected=f"{needed / 2**30:.1f} GiB for {header.path.name} as a plain folder",
            found=f"{free / 2**30:.1f} GiB free",
            fix="Make room, or name another folder in PAT_SERVE_CACHE.",
        )
    name = str(dtype).removeprefix("torch.")
    say(f"reading {header.path.name} ({', '.join(kinds)}) once: {needed / 2**30:.2f} GiB of {name} into {target}")
    with new_folder(target) as staging:
        total = sum(tensor.source.size_bytes for tensor in parts.tensors if tensor.source is not None)
        with byte_progress("read GGUF", total) as advance:
            write_weights(header, parts.family, parts.tensors, dtype, staging, advance)
        parts.tokenizer.save_pretrained(staging)
        write_json(staging / "generation_config.json", parts.generation_config)
        (staging / "README.md").write_text(_card(header.metadata), encoding="utf-8")
        write_json(staging / "config.json", parts.config | {"dtype": name})
        write_json(
            staging / PROVENANCE,
            {
                "sha256": sha256,
                "bytes": header.path.stat().st_size,
                "types": kinds,
                "dtype": name,
                "files": {path.name: path.stat().st_size for path in staging.iterdir() if path.is_file()},
            },
        )
        require_loadable(staging, parts.tokenizer, header)
        # The folder does not appear unless names, shapes and config fit each other.
        open_checkpoint(str(staging))


def _card(metadata: Mapping[str, Any]) -> str:
    """Write a model card with the license that the file names; the card of an export takes it from here."""
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    named = {key: metadata[name] for key, name in keys.items() if isinstance(metadata.get(name), str)}
    return f"---\n{yaml.safe_dump(named) if named else ''}---\n\nRead from a GGUF file; {PROVENANCE} has its SHA-256.\n"


def _cache() -> Path:
    named = os.environ.get("PAT_SERVE_CACHE")
    if named:
        return Path(named).expanduser().absolute() / "gguf"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pat-serve" / "gguf"


def _finished(cache: Path, sha256: str) -> Path | None:
    for folder in cache.glob(f"{sha256}-*-{_READER}"):
        if _whole(folder):
            return folder
    return None


def _whole(folder: Path) -> bool:
    """Every file is as long as it was written: what empties caches by age takes files, and not folders."""
    try:
        files = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size_bytes for name, size_bytes in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _identity(path: Path) -> dict[str, Any]:
    """Identify a file's content without reading it: path, size and time."""
    status = path.stat()
    return {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _note(cache: Path, path: Path) -> Path:
    return cache / "known" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _known(cache: Path, path: Path) -> str | None:
    """Look up the SHA-256 that a file of this path, size and time had when it was last read."""
    try:
        note = json.loads(_note(cache, path).read_text(encoding="utf-8"))
        sha256 = note.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return sha256 if note == _identity(path) and isinstance(sha256, str) else None


def _hash(cache: Path, path: Path) -> str:
    before, digest = _identity(path), hashlib.sha256()
    with path.open("rb") as file, byte_progress(f"hash {path.name}", before["bytes"]) as advance:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            advance(len(piece))
    write_json(_note(cache, path), before | {"sha256": digest.hexdigest()})
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time pass. On a file system without locks several write, and the last folder stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UsageError(
            cache,
            expected="a folder that can be written, for models that are read from GGUF",
            found=(error.strerror or "").lower(),
            fix="Name another one in PAT_SERVE_CACHE.",
        ) from error
