"""Small .deb files, made as `ar`, `tar` and `xz` would make them."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def write_deb(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a package of these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"x", "data.tar.xz": packed.getvalue()}
    content = b"!<arch>\n"
    for name, member in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode()
        content += header + member + b"\n" * (len(member) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def dictionary_files(name: str, entries: Mapping[str, str]) -> dict[str, bytes]:
    """The two files of a dictd dictionary."""
    text, index = "", ""
    for head, entry in {"00-database-info": "About it.\n", **entries}.items():
        index += f"{head}\t{in_base_64(len(text.encode()))}\t{in_base_64(len(entry.encode()))}\n"
        text += entry
    folder = "usr/share/dictd"
    return {f"{folder}/{name}.index": index.encode(), f"{folder}/{name}.dict.dz": gzip.compress(text.encode())}


def in_base_64(number: int) -> str:
    """A number as a dictd index has it."""
    digits = DIGITS[number % 64]
    while number := number // 64:
        digits = DIGITS[number % 64] + digits
    return digits
