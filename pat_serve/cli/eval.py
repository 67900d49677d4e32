"""pat-eval: what pruning kept, measured through the exported checkpoints."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: folders or hub ids; the first is the reference.")],
    data: Annotated[str, Flag(help="JSONL file or hub id: prompt/completion, Alpaca fields or messages.")],
    data_split: Annotated[str, Flag(help="Split of a hub dataset.")] = "test",
    limit: Annotated[int | None, Flag(help="Rows at most, the first ones.", min=1)] = None,
    max_length_tokens: Annotated[int, Flag(help="Tokens of an example.", min=8)] = 256,
    batch_size: Annotated[int, Flag(help="Examples at a time.", min=1)] = 16,
    dtype: Annotated[str, Flag(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Annotated[bool, Flag("--json", help="Print JSON to stdout instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Perplexity of the responses, given their prompts, for one or more checkpoints on the same rows.

    Example: `pat-eval dense/ pruned/ --data heldout.jsonl`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from pat_serve.checkpoint import open_checkpoint
    from pat_serve.hardware import serving_dtype
    from pat_serve.perplexity import measure_perplexity
    from pat_serve.progress import say
    from pat_serve.training.data import encode_rows, load_rows, load_tokenizer

    folders = [open_checkpoint(model).folder for model in models]
    results = []
    for model, folder in zip(models, folders, strict=True):
        tokenizer = load_tokenizer(folder)
        rows = load_rows(data, data_split, tokenizer)[:limit]
        examples, dropped = encode_rows(rows, tokenizer, max_length_tokens)
        if dropped:
            say(f"{model}: {dropped} of {len(rows)} rows left out, their prompt alone fills {max_length_tokens} tokens")
        measured = measure_perplexity(
            folder, examples, dtype=getattr(torch, serving_dtype(dtype)), batch_size=batch_size
        )
        results.append({"model": model, **vars(measured)})
    if as_json:
        sys.stdout.write(json.dumps({"data": data, "results": results}, indent=2) + "\n")
        return
    table = Table("model", "perplexity", "nats/token (± s.e.)", "to the first", "tokens")
    for result in results:
        ratio = result["perplexity"] / results[0]["perplexity"]
        spread = f"{result['nll_nats']:.4f} ± {result['nll_standard_error_nats']:.4f}"
        table.add_row(result["model"], f"{result['perplexity']:.3f}", spread, f"{ratio:.3f}x", str(result["tokens"]))
    Console().print(table)


def main() -> None:
    """Entry point."""
    run_command(evaluate)
