"""One line for an engine that does not start, and none for an engine that ends as it should."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pat_serve.errors import EngineError

logger = logging.getLogger(__name__)


@contextmanager
def starting(what: str, *, expected: str, fix: str) -> Iterator[None]:
    """Make any error in the block an EngineError; its traceback goes to the log for --debug.

    Args:
        what: the model or flag that the error names.
        expected: what should have started.
        fix: the way out.

    Raises:
        EngineError: the block raised an exception.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        logger.debug("%s: the engine ended with an error", what, exc_info=True)
        raise EngineError(what, expected=expected, found=_one_line(error), fix=fix) from error


def expect_its_end() -> None:
    """Keep vLLM from logging an orderly end as an error, with a traceback.

    vLLM reads an engine's output in a task, which may see the engine go before the task itself is stopped.
    """
    logging.getLogger("vllm.v1.engine.async_llm").addFilter(lambda record: record.levelno < logging.ERROR)


def _one_line(error: Exception) -> str:
    # pydantic puts its sentence on the second line, between a heading and a link.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("Value error, ")]
    text = told[0].removeprefix("Value error, ").split(" [type=")[0] if told else (lines[0] if lines else "no message")
    text = text.rstrip(".")
    return f"{type(error).__name__}: {text}" if not told else text
