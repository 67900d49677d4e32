"""Sizes as transformers writes them: 5GB, 500MB, 2GiB."""

from __future__ import annotations

import re

from pat_serve.errors import UsageError

_UNITS = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
}  # fmt: skip
_LEAST_BYTES = 1_000_000


def parse_size(text: str, flag: str) -> int:
    """Read the bytes of "5GB", "500 MB", "1.5GiB" or a plain number of bytes; case does not matter.

    Raises:
        UsageError: the text is no size, or the size is below 1MB.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size_bytes < _LEAST_BYTES:
        raise UsageError(
            flag, expected="a size of 1MB or more, such as 5GB, 500MB or 2GiB", found=text, fix=f"Try {flag} 5GB."
        )
    return size_bytes
