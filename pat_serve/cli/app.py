"""Code that all commands share: the `--debug` flag, and the way of an error to the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

from pat_serve.errors import PatServeError, UsageError
from pat_serve.files.disk import full_disk
from pat_serve.machine.local_addresses import keep_local_addresses_direct
from pat_serve.terminal.console_text import use_plain_signs

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def new_app() -> typer.Typer:
    """A typer application without shell-completion flags and without typer's own tracebacks."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def run_app(app: typer.Typer) -> None:
    """Run a command line; end the process with the exit code of the outcome.

    0 done, 1 failed or a claim not met, 2 wrong usage, 3 inconclusive. A `PatServeError` becomes one line on stderr.
    Any other exception is a defect of ours, and the line says so. `--debug` shows the traceback of either.
    """
    _reporting(app)


def run_command(command: Callable[..., Any]) -> None:
    """Run a command line that is a single command.

    A command may return a function with the rest of its work. The function is called once typer's dozen frames are off
    the stack; errors of typer's own mean nothing there. Python 3.11 keeps frames in chunks of 16 KiB. Where a loop's
    calls cross the border of a chunk, Python maps and unmaps memory at each call: importing vLLM from below typer took
    twice as many page faults (LOG.md).
    """
    left: list[Callable[[], None]] = []

    @wraps(command)
    def keep(*args: Any, **kwargs: Any) -> None:
        if callable(rest := command(*args, **kwargs)):
            left.append(rest)

    app = new_app()
    app.command()(keep)
    try:
        run_app(app)
    except SystemExit as end:
        if end.code or not left:
            raise
    for rest in left:
        _reporting(rest)


def check_text(arguments: Sequence[str], folder: str) -> None:
    """Refuse names that are no text in UTF-8, in any argument and of the folder that relative paths start from.

    safetensors, tokenizers and vLLM take paths as text, and records name them in JSON. So such a name would end in an
    error of theirs, and some of them come after hours of work.

    Raises:
        UsageError: a name has bytes that are no UTF-8.
    """
    for subject, text in (*(("an argument", text) for text in arguments), ("the working directory", folder)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                subject,
                expected="text in UTF-8",
                found=repr(os.fsencode(text)),
                fix="Rename the file or the folder.",
            ) from None


def _reporting(work: Callable[[], Any]) -> None:
    if not sys.stderr.isatty():
        # transformers and huggingface_hub draw bars of their own. They read these variables later, when imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_local_addresses_direct(os.environ)
    use_plain_signs()
    flags = sys.argv[1:]
    debug = "--debug" in (flags[: flags.index("--")] if "--" in flags else flags)
    try:
        check_text(flags, _working_directory())
        work()
    except KeyboardInterrupt:
        sys.exit(130)
    except PatServeError as error:
        if debug:
            raise
        sys.exit(_report(str(error), error.exit_code))
    except OSError as error:
        if debug:
            raise
        sys.exit(_report(f"{error.filename or 'input or output'}: {error.strerror or error}", 1))
    except Exception as error:
        if debug:
            raise
        if (full := full_disk(error)) is not None:
            sys.exit(_report(f"a disk is full, or a quota used up: {full}. Free some space, and try again.", 1))
        message = f"internal error: {type(error).__name__}: {error}"
        sys.exit(_report(f"{message}\nThis is a defect in pat-serve; run again with --debug for the traceback.", 1))


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # It was deleted; only relative paths need it, and the system's error names them.
        return ""


def _report(message: str, exit_code: int) -> int:
    sys.stderr.write(f"{sys.argv[0].rsplit('/', 1)[-1]}: {message}\n")
    return exit_code
