"""API keys: their sources, the digests that are kept of them, and the owner of a request."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pat_serve.errors import UsageError
from pat_serve.files.text_files import OtherEncodingError, read_utf8

# These variables are read once and removed, so that no child process inherits them. vLLM's own variable keeps working.
ENVIRONMENT = ("PAT_SERVE_API_KEYS", "VLLM_API_KEY")
# A name ends at the first "="; what follows must be more than the padding at the end of a base64 key.
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_.-]{0,63})=(?!=*$)(.+)")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """An API key as the server keeps it: the name that logs show, and a SHA-256 digest."""

    name: str
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class KeyRing:
    """All keys that open the server. A server without keys is open to everybody who reaches it."""

    keys: tuple[ApiKey, ...] = ()

    def owner(self, authorization: bytes | None) -> str | None:
        """The name of the key in an Authorization header; None if the header bears none of the keys.

        The search takes the same time whichever key matches, and however near a wrong key comes: all digests are
        compared.
        """
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = None
        for key in self.keys:
            if secrets.compare_digest(digest, key.digest):
                found = key.name
        return found if scheme.lower() == b"bearer" else None


def collect_keys(flags: Sequence[str], *, environment: MutableMapping[str, str], file: Path | None = None) -> KeyRing:
    """The keys of all sources together.

    Args:
        flags: KEY or NAME=KEY each.
        environment: `PAT_SERVE_API_KEYS` (separated by commas) and `VLLM_API_KEY` (one key without a name, as vLLM has
            it); both are removed from it.
        file: one key a line; empty lines and those that start with # are skipped.

    Raises:
        UsageError: a source without a key, a key that cannot travel in a header, the same name twice, or an unreadable
            file.
    """
    variables = {name: environment.pop(name) for name in ENVIRONMENT if name in environment}
    listed = variables.get(ENVIRONMENT[0], "").split(",")
    # A source that is there and empty is most often a variable that the caller forgot to set. An empty source is
    # refused, because a server without keys is open to all.
    for source, empty in (
        ("--api-key", any(not text.strip() for text in flags)),
        *((name, not value.strip(", \t\r\n")) for name, value in variables.items()),
    ):
        if empty:
            raise UsageError(
                source, expected="a key", found="nothing", fix="Give one, or leave it out (unset a variable)."
            )
    given = [_split(text) for text in (*flags, *listed, *(_lines(file) if file is not None else ())) if text.strip()]
    if ENVIRONMENT[1] in variables:
        given.append((None, variables[ENVIRONMENT[1]].strip()))
    keys: dict[str, ApiKey] = {}
    for told, secret in given:
        name = told or f"key-{len(keys) + 1}"
        if not secret.isprintable() or " " in secret:
            raise UsageError(
                f"API key {name}",
                expected="printable characters",
                found="a space or a control character",
                fix="Choose another key.",
            )
        if name in keys:
            raise UsageError(f"API key {name}", expected="one key a name", found="two", fix="Give each its own name.")
        keys[name] = ApiKey(name=name, digest=hashlib.sha256(secret.encode()).digest())
    return KeyRing(keys=tuple(keys.values()))


def first_key(file: Path) -> str:
    """The first key of a key file, without its name, for a client that reads the same file as the server.

    Raises:
        UsageError: the file is unreadable, or holds no key.
    """
    return _split(_lines(file)[0])[1]


def _split(text: str) -> tuple[str | None, str]:
    """Part a flag or a line into the name, if there is one, and the key."""
    named = _NAMED.fullmatch(text.strip())
    return (named[1], named[2]) if named else (None, text.strip())


def _lines(file: Path) -> list[str]:
    try:
        lines = read_utf8(file).splitlines()
    except (OSError, ValueError) as error:
        told = str(error) if isinstance(error, OtherEncodingError) else "a file that is not text"
        found = error.strerror if isinstance(error, OSError) else told
        raise UsageError(
            f"--api-key-file {file}",
            expected="a readable file in UTF-8, a key a line",
            found=found or "an error",
            fix="Check path, permissions and encoding.",
        ) from error
    keys = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(
            f"--api-key-file {file}",
            expected="at least one key",
            found="none",
            fix="Write a key a line, or leave the flag out.",
        )
    return keys
