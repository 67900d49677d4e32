"""Fill the table of docs/methods.md: train, export and measure every method on one model.

Example: `python -m benchmarks.methods smollm2/ --data train.jsonl --wikitext2 wiki.test.raw --out methods/`

Each row is made by the commands that a user has: `pat-train`, `pat-export`, `pat-eval`, `pat-bench speedup` and
`pat-serve`. What is finished stays in `--out`; a second call goes on from there, and `--minutes` ends it in time.
`--only` makes some rows. The table is printed at the end, with the rows that are there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.methods.answers import QUESTION, listing
from benchmarks.methods.making import Setup, make
from benchmarks.methods.plot import write_plot
from benchmarks.methods.rows import ROWS
from benchmarks.methods.table import table

Option = typer.Option


def main(
    model: Annotated[Path, typer.Argument(help="The dense model.")],
    data: Annotated[Path, Option(help="Instructions to calibrate and to train on, as pat-train takes them.")],
    wikitext2: Annotated[Path, Option(help="WikiText-2's test file.")],
    out: Annotated[Path, Option(help="Folder for runs, exports and figures; resumed if it is there.")],
    items: Annotated[Path | None, Option(help="Folder with local items of the paper's tasks.")] = None,
    only: Annotated[list[str] | None, Option(help="Make this row alone; several times for several.")] = None,
    steps: Annotated[int, Option(help="Optimizer steps of a row that trains.")] = 60,
    limit: Annotated[int, Option(help="Windows of the text, and items of each task.")] = 40,
    rounds: Annotated[int, Option(help="Rounds of pat-bench speedup; 0 leaves the speed out.")] = 0,
    ask: Annotated[bool, Option("--ask", help="Serve each checkpoint and ask it a question over /generate.")] = False,
    plot: Annotated[Path | None, Option(help="Write quality against speed as a page here.")] = None,
    minutes: Annotated[float, Option(help="Begin no row after so many.")] = 1e9,
) -> None:
    """Make the rows that are missing, and print the table."""
    setup = Setup(
        model=model.absolute(),
        data=data.absolute(),
        wikitext2=wikitext2.absolute(),
        items=items.absolute() if items else None,
        out=out.absolute(),
        steps=steps,
        limit=limit,
        rounds=rounds,
        ask=ask,
    )
    unknown = set(only or ()) - ROWS.keys()
    if unknown:
        raise typer.BadParameter(f"--only {unknown.pop()!r}: one of {', '.join(ROWS)}")
    began_s = time.monotonic()
    for name in only or ROWS:
        if time.monotonic() - began_s > 60 * minutes:
            break
        make(name, setup)
    known = [path for path in (setup.figures_of(name) for name in ROWS) if path.exists()]
    made = [row for path in known if "measures" in (row := json.loads(path.read_text(encoding="utf-8")))]
    print(table(made))
    if plot is not None:
        write_plot(made, plot)
    if answers := {row["name"]: row["answer"] for row in made if "answer" in row}:
        print(f"\n{QUESTION}\n\n{listing(answers)}")


if __name__ == "__main__":
    typer.run(main)
