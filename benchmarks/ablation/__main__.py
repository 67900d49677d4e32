"""Train, export and measure every variant; print one line each, keep all in results.jsonl, and a table with spreads.

Example: `python -m benchmarks.ablation --data TEXTS --out ablation/ --seeds 3 --steps 150`
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ablation.corpus import build_corpus
from benchmarks.ablation.variants import SHARED, TIED_VARIANTS, VARIANTS
from benchmarks.exported import train_and_export
from benchmarks.parts import parse
from pat_serve.demo.tiny.base_model import BaseSettings, train_base
from pat_serve.machine.hardware import describe

BASE = "the base, untuned"


def main(
    data: Annotated[Path, typer.Option(help="Folder with wikitext2.{valid,test}.txt and eval/*.json.")],
    out: Annotated[Path, typer.Option(help="Base, rows and results; finished results are not repeated.")],
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 150,
    base_steps: Annotated[int, typer.Option(help="Optimizer steps of the base.")] = 900,
    only: Annotated[list[str] | None, typer.Option(help="Variants whose name contains this.")] = None,
    part: Annotated[
        str | None, typer.Option(help="2/8: the second eighth of the runs, beside other processes that do the others.")
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", help="A base with tied embeddings, and what suits it.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of what is there.")] = False,
) -> None:
    """Compare PAT's options on a small base over real text, at equal steps and tokens."""
    number, parts = parse(part)
    side = out if parts == 1 else out / f"part-{number}-of-{parts}"
    results = side / "results.jsonl"
    variants = TIED_VARIANTS if tied else VARIANTS
    if part and not table and not (out / "base").exists():
        raise typer.BadParameter(f"--part {part}: each would train the base; first without it, with --seeds 0")
    if not table:
        _prepare(data, out, BaseSettings(steps=base_steps, batch_size=16, tied=tied))
        side.mkdir(exist_ok=True)
        done = {(line["variant"], line["seed"], line["steps"]) for line in _all_lines(out)}
        if (BASE, 0, steps) not in done and number == 1:
            _keep({"variant": BASE, "seed": 0, "steps": steps, **_quality(out, out / "base")}, results)
        wanted = [
            (name, seed)
            for seed in range(seeds)
            for name in variants
            if not only or any(piece in name for piece in only)
        ]
        for name, seed in wanted[number - 1 :: parts]:
            if (name, seed, steps) not in done:
                _keep(_measure(name, variants[name], out, side, seed, steps), results)
    _print_table([line for line in _all_lines(out) if line["steps"] == steps], list(variants))


def _prepare(data: Path, out: Path, settings: BaseSettings) -> None:
    if not (out / "base").exists():
        corpus = build_corpus(data)
        corpus.save(out / "data")
        train_base(corpus.base_texts, out / "base", settings)


def _measure(name: str, settings: dict[str, Any], out: Path, side: Path, seed: int, steps: int) -> dict[str, Any]:
    data = str(out / "data" / "tune_rows.jsonl")
    inputs = {"model": str(out / "base"), "data": data, "max_steps": steps, "seed": seed}
    exported = train_and_export(SHARED | settings | inputs, name, side / "run", side / "pruned")
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        **_quality(out, side / "pruned"),
        **exported,
        "machine": describe(),
    }


def _quality(out: Path, model: Path) -> dict[str, float]:
    """Perplexity of a checkpoint on the two held-out sets."""
    import torch

    from pat_serve.perplexity import measure_perplexity
    from pat_serve.training.data import encode_rows, load_rows, load_tokenizer

    tokenizer = load_tokenizer(out / "base")
    figures = {}
    for figure, name in (("items_ppl", "heldout_items"), ("articles_ppl", "heldout_articles")):
        rows = load_rows(str(out / "data" / f"{name}.jsonl"), "train", tokenizer)
        encoded, _ = encode_rows(rows, tokenizer, 128)
        figures[figure] = measure_perplexity(model, encoded, dtype=torch.float32).perplexity
    return figures


def _keep(line: dict[str, Any], results: Path) -> None:
    print(json.dumps(line), flush=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _all_lines(out: Path) -> list[dict[str, Any]]:
    paths = [out / "results.jsonl", *sorted(out.glob("part-*/results.jsonl"))]
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def _print_table(lines: list[dict[str, Any]], variants: list[str]) -> None:
    """Means over seeds and their standard deviations; the distance to dense LoRA is paired by seed."""
    dense = {line["seed"]: line for line in lines if line["variant"] == "dense LoRA"}
    print("| variant | seeds | items: perplexity | to dense LoRA | articles: perplexity | to dense LoRA |")
    print("|---|---|---|---|---|---|")
    for name in (BASE, *variants):
        own = [line for line in lines if line["variant"] == name]
        if not own:
            continue
        cells = [name, str(len(own))]
        for figure in ("items_ppl", "articles_ppl"):
            cells.append(_spread([line[figure] for line in own], "{:.2f}"))
            pairs = [line[figure] / dense[line["seed"]][figure] - 1 for line in own if line["seed"] in dense]
            cells.append(_spread([100 * ratio for ratio in pairs], "{:+.2f}") + " %" if pairs else "")
        print("| " + " | ".join(cells) + " |")


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    typer.run(main)
