"""Build the ground: text to recover a pruned model on.

python -m benchmarks.ground --out ground --wikitext2-valid wiki.valid.raw --items ITEMS --keep-out wiki.test.raw
python -m benchmarks.ground --out ground ... --model SmolLM2-135M-Instruct/ --answers 1000
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command


def ground(
    out: Annotated[Path, typer.Option(help="Folder to write; packages and answers that lie in it are used again.")],
    wikitext2_valid: Annotated[Path | None, typer.Option(help="WikiText-2's validation file.")] = None,
    items: Annotated[
        Path | None, typer.Option(help="Folder of multiple-choice items; half of each task is held out.")
    ] = None,
    keep_out: Annotated[
        list[Path] | None, typer.Option(help="Text file that nothing may overlap with, e.g. WikiText-2's test file.")
    ] = None,
    packages: Annotated[bool, typer.Option(help="Read dictionaries and books of Debian packages.")] = True,
    debs: Annotated[
        Path | None, typer.Option(help="Folder of .deb files; missing ones are downloaded. [default: OUT/debs]")
    ] = None,
    characters: Annotated[int, typer.Option(help="Characters of one source at most.", min=1)] = 12_000_000,
    model: Annotated[Path | None, typer.Option(help="Chat model that answers prompts made of the texts.")] = None,
    answers: Annotated[int, typer.Option(help="Prompts that the model answers.", min=1)] = 1_000,
    debug: Debug = False,
) -> None:
    """Write rows for `pat-train --data`, held-out text and items for `pat-eval`, and CONTENTS.md."""
    from benchmarks.ground.build import Inputs, build, write
    from benchmarks.ground.own_answers import write_own_answers, write_prompts
    from benchmarks.ground.record import write_record

    inputs = Inputs(
        wikitext2_valid=wikitext2_valid,
        items=items,
        keep_out=tuple(keep_out or ()),
        debs=(debs or out / "debs") if packages else None,
        characters=characters,
    )
    built = build(inputs)
    write(built, out)
    write_prompts(built, out)
    own = write_own_answers(built, model, answers, out) if model is not None else None
    write_record(built, out, own)
    total = sum(kept.characters for kept in built.kept.values())
    typer.echo(f"{out}: {len(built.trained):,} rows, {total:,} characters; CONTENTS.md says what is in them")


if __name__ == "__main__":
    run_command(ground)
