"""pat-bench speculative: measure the pruned model as the draft of its dense parent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import (
    Force,
    Json,
    LayersOfBoth,
    Out,
    OutputTokens,
    RoundPairs,
    check_outputs,
    engine_settings,
    progress_line,
    write_report,
)
from pat_serve.errors import DataError, UsageError
from pat_serve.files.text_files import read_lines

if TYPE_CHECKING:
    from pat_serve.tokens.prompts import Messages


def speculative(
    model: Annotated[str, typer.Option(help="Dense model: folder, .gguf, hub id, or a shipped shape.")],
    draft: Annotated[str, typer.Option(help="Pruned model that proposes tokens, in the same forms.")],
    draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft proposes a step.")] = 3,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File with a prompt a line, as text or as JSONL with prompt or messages; a chat template is applied. "
            "[default: random tokens]"
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt.")] = 64,
    output_tokens: OutputTokens = 48,
    rounds: RoundPairs = 12,
    layers: LayersOfBoth = None,
    load_format: Annotated[str, typer.Option(help="auto takes real weights, dummy random ones.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Dtype to compute in. In 16 bits the outputs may differ by rounding.")
    ] = "float32",
    enforce_eager: Annotated[bool, typer.Option(help="Run without torch.compile.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of random prompts and bootstrap.")] = 0,
    as_json: Json = False,
    out: Out = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Measure speculative decoding of a dense model with a pruned draft: speed-up, acceptance and equal output.

    The dense model checks every token, so its greedy output stays the same. Exit code 1: it changed in float32.

        pat-bench speculative --model dense/ --draft pruned/ --prompts prompts.txt
    """
    from pat_serve.server.bench.speculative.result import SpeculativeSettings
    from pat_serve.server.bench.speculative.run import measure_speculative
    from pat_serve.server.bench.speculative.table import print_speculative

    settings = SpeculativeSettings.model_validate(
        {
            "draft_tokens": draft_tokens,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "rounds": rounds,
        }
        | engine_settings(layers=layers, load_format=load_format, dtype=dtype, enforce_eager=enforce_eager, seed=seed)
    )
    texts = [] if prompts is None else _prompts(prompts)
    check_outputs(out, force=force)
    with progress_line() as progress:
        result = measure_speculative(model, draft, settings, texts, progress=progress)
    write_report(result, out=out, html=None, as_json=as_json, show=lambda: print_speculative(result))
    if dtype == "float32" and result.identical < len(result.rounds):
        raise typer.Exit(1)


def _prompts(file: Path) -> Sequence[Messages]:
    from pat_serve.tokens.prompts import asked, prompts_from_file

    if file.suffix.lower() == ".jsonl":
        try:
            return prompts_from_file(file).chats
        except DataError as error:
            raise UsageError(
                f"--prompts {error.subject}", expected=error.expected, found=error.found, fix=error.fix
            ) from error
    try:
        texts = [line for line in read_lines(file) if line.strip()]
    except OSError as error:
        raise UsageError(
            f"--prompts {file}",
            expected="a file of prompts",
            found=error.strerror or str(error),
            fix="Check the path, or leave the flag out for random tokens.",
        ) from error
    except ValueError:
        texts = []
    if not texts:
        raise UsageError(
            f"--prompts {file}",
            expected="a prompt a line, in UTF-8",
            found="nothing or something else",
            fix="Mend the file, or leave the flag out for random tokens.",
        )
    return asked(texts)
