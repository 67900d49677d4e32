"""Data sets from the Hugging Face hub, or its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pat_serve.errors import HubError, PatServeError, first_line


@contextmanager
def loading(subject: str, *, fix: str) -> Iterator[None]:
    """Turn every exception of a data set's loader into one error.

    Args:
        subject: the data set.
        fix: the way out, as an imperative sentence.

    Raises:
        HubError: the data set could not be loaded.
    """
    try:
        yield
    except PatServeError:
        raise
    # The hub client and datasets raise a dozen unrelated types; all mean the same to the user.
    except Exception as error:
        raise HubError(
            subject,
            expected="a data set that can be downloaded or is cached",
            found=f"{type(error).__name__}: {first_line(error)}",
            fix=fix,
        ) from error
