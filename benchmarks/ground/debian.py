"""Packages of a Debian mirror: fetched with `apt-get download`, unpacked in memory, never installed."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ground import formats
from benchmarks.ground.passages import Document
from pat_serve.errors import DataError, HubError, UsageError
from pat_serve.terminal.progress import say

_ARCHIVE_MARK = b"!<arch>\n"
_HEADER_BYTES = 60
# The short names of a copyright file's form; some files have the licence's text in their place.
_LICENSE = re.compile(r"^License:[ \t]*([\w.+-]+(?: (?:or|and|with) [\w.+-]+)*)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package with English text.

    Attributes:
        name: of the package.
        source: name of the source that its text counts as.
        files: pattern of the paths that are read.
        read: source and content by path -> documents.
        license: of its text, where the package's copyright file names none in the form that is read.
    """

    name: str
    source: str
    files: str
    read: Callable[[str, Mapping[str, bytes]], Iterator[Document]]
    license: str


def _dictionary(source: str, files: Mapping[str, bytes]) -> Iterator[Document]:
    [index] = [content for path, content in files.items() if path.endswith(".index")]
    [packed] = [content for path, content in files.items() if path.endswith(".dict.dz")]
    return formats.dictionary(source, index, packed)


_DICTD = r"usr/share/dictd/[^/]+\.(index|dict\.dz)"
_FORTUNES = r"usr/share/games/fortunes/[a-z-]+"
PACKAGES = (
    Package(name="dict-wn", source="wordnet", files=_DICTD, read=_dictionary, license="WordNet"),
    Package(name="dict-gcide", source="gcide", files=_DICTD, read=_dictionary, license="GPL-3+"),
    Package(name="dict-foldoc", source="foldoc", files=_DICTD, read=_dictionary, license="GFDL-1.2+"),
    Package(name="dict-jargon", source="jargon", files=_DICTD, read=_dictionary, license="public domain"),
    Package(name="dict-devil", source="devil", files=_DICTD, read=_dictionary, license="public domain"),
    Package(name="fortunes-min", source="fortunes", files=_FORTUNES, read=formats.quotations, license="BSD"),
    Package(name="fortunes", source="fortunes", files=_FORTUNES, read=formats.quotations, license="BSD"),
    *(
        Package(name=name, source="books", files=files, read=formats.books, license=license_name)
        for name, files, license_name in (
            ("debian-handbook", r"usr/share/doc/debian-handbook/html/en-US/.*\.html", "GPL-2+ or CC-BY-SA-3.0"),
            ("debian-reference-en", r"usr/share/.*\.en\.html", "GPL-2+"),
            ("developers-reference", r"usr/share/(?!.*/(de|fr|it|ja|ru)/).*\.html", "GPL-2+"),
            ("debian-policy", r"usr/share/.*\.html", "GPL-2+"),
            ("debian-kernel-handbook", r"usr/share/.*\.html", "GPL-2+"),
            ("harden-doc", r"usr/share/.*/en-US/.*\.html", "GPL-2+"),
            ("installation-guide-amd64", r"usr/share/.*/en/.*\.html", "GPL-2+"),
            ("gnome-user-docs", r"usr/share/help/C/.*\.page", "CC-BY-SA-3.0"),
            ("git-doc", r"usr/share/.*\.html", "GPL-2"),
            ("sqlite3-doc", r"usr/share/.*\.html", "public domain"),
            ("postgresql-doc-15", r"usr/share/.*\.html", "PostgreSQL"),
            ("python3.11-doc", r"usr/share/.*\.html", "PSF-2"),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """The text and the licence that were read of a package.

    Attributes:
        package: as it was asked for.
        path: the .deb file.
        version: of its name.
        documents: its text.
        copyright: the package's own file on its licences; empty where it has none.
    """

    package: Package
    path: Path
    version: str
    documents: list[Document]
    copyright: str

    @property
    def licenses(self) -> list[str]:
        """Licences that the copyright file names, and else the one that is known of the text."""
        told = sorted({name.strip() for name in _LICENSE.findall(self.copyright)})
        return told or [self.package.license]


def fetch(package: Package, folder: Path) -> Path | None:
    """Find a package's .deb file in a folder, and download it if it is missing.

    Returns:
        None where the mirror does not have it.

    Raises:
        UsageError: this machine has no apt-get.
        HubError: the mirror was not reached.
    """
    found = sorted(folder.glob(f"{package.name}_*.deb"))
    if found:
        return found[-1]
    if shutil.which("apt-get") is None:
        raise UsageError(
            f"the package {package.name}",
            expected="apt-get, or the .deb file in a folder",
            found="neither",
            fix=f"Put the file into {folder}, or leave the packages out with --no-packages.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", "-q", package.name]
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    found = sorted(folder.glob(f"{package.name}_*.deb"))
    if found:
        return found[-1]
    reasons = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")]
    if any("Unable to locate" in reason or "no installation candidate" in reason for reason in reasons):
        say(f"{package.name} is left out: the package lists have no such package")
        return None
    raise HubError(
        f"the package {package.name}",
        expected="a Debian mirror that apt-get reaches",
        found=reasons[0] if reasons else f"exit code {done.returncode} of apt-get",
        fix=f"Run apt-get update, put the .deb file into {folder}, or leave the packages out with --no-packages.",
    )


def unpack(package: Package, path: Path) -> Unpacked:
    """Read the text and the licence of a .deb file.

    Raises:
        DataError: the file is none, or has no text where it should be.
    """
    wanted, copyright_path = re.compile(package.files), f"usr/share/doc/{package.name}/copyright"
    files: dict[str, bytes] = {}
    told = ""
    with _contents(path) as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            if not entry.isfile() or not (wanted.fullmatch(name) or name == copyright_path):
                continue
            file = archive.extractfile(entry)
            assert file is not None, "a regular file has content"
            if name == copyright_path:
                told = file.read().decode("utf-8", "replace")
            else:
                files[name] = file.read()
    if not files:
        raise DataError(
            path,
            expected=f"files {package.files} in it",
            found="none",
            fix=f"Remove it to leave {package.name} out, or mend PACKAGES: this release lays it out otherwise.",
        )
    documents = list(package.read(package.source, files))
    version = path.name.split("_")[1].replace("%3a", ":")
    return Unpacked(package=package, path=path, version=version, documents=documents, copyright=told)


def _contents(path: Path) -> tarfile.TarFile:
    """Open the archive of files in a .deb, which is an `ar` archive of three members."""
    content = path.read_bytes()
    at = len(_ARCHIVE_MARK)
    while content.startswith(_ARCHIVE_MARK) and at + _HEADER_BYTES <= len(content):
        header = content[at : at + _HEADER_BYTES]
        size = int(header[48:58])
        start = at + _HEADER_BYTES
        if header[:16].startswith(b"data.tar"):
            try:
                return tarfile.open(fileobj=io.BytesIO(content[start : start + size]))
            except tarfile.TarError as error:
                raise DataError(
                    path, expected="files packed by xz or gzip", found=str(error), fix="Download it again."
                ) from error
        at = start + size + size % 2
    raise DataError(path, expected="a Debian package", found="another file", fix="Remove it; it is then downloaded.")
