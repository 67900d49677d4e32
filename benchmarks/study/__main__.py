"""Train, export and measure every method at every ratio; what is finished is not repeated.

Example: `python -m benchmarks.study --out study/ --data TEXTS`

Without --data it reads the interpreter's documentation alone. Every line of results.jsonl is one checkpoint; the tables
and the curve are made from it, at any time, by --table.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.parts import parse
from benchmarks.study import families, measuring, report, runs
from benchmarks.study.corpus import build
from benchmarks.study.domains import DOMAINS, build_domain
from benchmarks.study.methods import BASE, DENSE, SWEEPS, Job, jobs
from pat_serve.checkpoints.locate import read_config
from pat_serve.demo.tiny.base_model import BaseSettings, train_base
from pat_serve.errors import UsageError
from pat_serve.files.atomic import write_text

# Widths and layers; the first is what an hour on two cores holds.
SIZES = {
    "tiny": BaseSettings(
        hidden_size=128, intermediate_size=352, layers=3, heads=4, kv_heads=2, batch_size=16, steps=400
    ),
    "small": BaseSettings(batch_size=16, steps=900),
    "large": BaseSettings(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        layers=16,
        heads=12,
        kv_heads=4,
        context_tokens=256,
        batch_size=128,
        steps=800,
        learning_rate=1e-3,
        initializer_range=0.02,
    ),
}


_SWEEP_NAMES = (*SWEEPS, families.SWEEP)


def main(
    out: Annotated[Path, typer.Option(help="Base, data and results; finished results are not repeated.")],
    data: Annotated[Path | None, typer.Option(help="Folder with wikitext2.{valid,test}.txt and eval/*.json.")] = None,
    size: Annotated[str, typer.Option(help=f"Of the base: {', '.join(SIZES)}.")] = "small",
    seeds: Annotated[int, typer.Option(help="Runs of each method at each ratio; 0: train the bases alone.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 150,
    only: Annotated[list[str] | None, typer.Option(help="Methods whose name contains this.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="No methods whose name contains this; the families keep all.")
    ] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Only this cut, such as 0.25.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help=f"Beside the curve: {', '.join(_SWEEP_NAMES)}.")] = None,
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="The curve's methods too, or the sweeps' alone.")
    ] = True,
    domain: Annotated[
        str | None, typer.Option(help=f"Tune on other texts, at 25 % and with three methods: {', '.join(DOMAINS)}.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="A base of the same size, instead of training one.")] = None,
    more: Annotated[Path | None, typer.Option(help="More texts for the base: benchmarks.study.package_docs.")] = None,
    part: Annotated[
        str | None, typer.Option(help="2/8: the second eighth of the runs, beside other processes that do the others.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin no run after so many seconds.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the tables of what is there.")] = False,
) -> None:
    """Quality against speed at 12.5, 25, 37.5 and 50 %, with spreads over seeds."""
    began = time.monotonic()
    number, parts = parse(part)
    side = None if part is None else f"part-{number}-of-{parts}"
    results = out / (f"results-{side}.jsonl" if side else "results.jsonl")
    _check_names(sweep or [], domain)
    if part and not table and not (out / "base").exists():
        raise typer.BadParameter(f"--part {part}: each would train the base; first without it, with --seeds 0")
    if part and not table and seeds and families.SWEEP in (sweep or []) and families.without_base(out):
        raise typer.BadParameter(f"--part {part}: each would train the families' bases; first with --seeds 0")
    if not table:
        _prepare(out, data, SIZES[size], domain, base, more)
        if "hio" in (sweep or []) and number == 1:
            _measure_operators(out)
        of_table = [name for name in sweep or [] if name in SWEEPS]
        wanted = [
            job
            for job in jobs(seeds, of_table, ratios=ratio, domain=domain is not None, curve=curve)
            # Speed is measured against the dense model, so one is always there; parts measure none.
            if (side is None and (job.name, job.seed) == (DENSE, 0))
            or (
                (not only or any(name in job.name for name in only))
                and not any(name in job.name for name in without or ())
            )
        ]
        done = _finished(out, wanted, steps, side)
        if (BASE, 0.0, 0, steps) not in done and number == 1:
            figures = measuring.quality(out / "base", out / "data")
            _keep([{"method": BASE, "ratio": 0.0, "seed": 0, "steps": steps} | figures], results)
        for job in wanted[number - 1 :: parts]:
            if job.key(steps) in done:
                continue
            if seconds is not None and time.monotonic() - began > seconds:
                print(f"stopped after {seconds:g} s; call again to go on")
                break
            _keep(runs.run(out, job, steps, SIZES[size].hidden_size, side), results)
        if families.SWEEP in (sweep or []):
            left = None if seconds is None else seconds - (time.monotonic() - began)
            _run_families(out, data, SIZES[size], seeds, steps, left, (number, parts, side))
    lines = [line for line in report.read_all(out) if line["steps"] == steps]
    print(report.tables(lines, _operator_costs(out)))
    print(families.table(out, steps))
    report.write_curve(report.of_curve(lines), out / "curve.html")


def _check_names(sweeps: list[str], domain: str | None) -> None:
    for name in sweeps:
        if name not in _SWEEP_NAMES:
            raise typer.BadParameter(f"--sweep {name}: one of {', '.join(_SWEEP_NAMES)}")
    if families.SWEEP in sweeps and domain is not None:
        raise typer.BadParameter("--sweep families has the study's own texts: leave --domain out")
    if domain is not None and domain not in DOMAINS:
        raise typer.BadParameter(f"--domain {domain}: one of {', '.join(DOMAINS)}")


def _prepare(
    out: Path,
    data: Path | None,
    settings: BaseSettings,
    domain: str | None,
    base: Path | None,
    more: Path | None,
) -> None:
    marker = out / "data" / "domain.json"
    if not (out / "base").exists():
        try:
            corpus = build(data, more=more) if domain is None else build_domain(domain, data)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error
        corpus.save(out / "data")
        write_text(marker, json.dumps(domain))
        if base is None:
            train_base(corpus.base_texts, out / "base", settings)
        else:
            shutil.copytree(base, out / "base")
    # A folder that is older than domains has no marker.
    written = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
    if written != domain:
        raise typer.BadParameter(f"{out} holds the texts of domain {written}, not {domain}: choose another --out")
    width = read_config(out / "base")["hidden_size"]
    if width != settings.hidden_size:
        raise typer.BadParameter(
            f"{out} holds a base of width {width}, not {settings.hidden_size}: choose another --out"
        )


def _finished(folder: Path, wanted: list[Job], steps: int, side: str | None) -> set[tuple[str, float, int, int]]:
    """Keys of the runs that are done.

    Speed is measured against the dense model, and parts leave none: while other runs that are wanted are missing, so is
    that of a dense model that is not there.
    """
    done = {(line["method"], line["ratio"], line["seed"], line["steps"]) for line in report.read_all(folder)}
    if side is None and not (folder / "dense").exists() and not all(job.key(steps) in done for job in wanted):
        done.discard((DENSE, 0.0, 0, steps))
    return done


def _run_families(
    out: Path,
    data: Path | None,
    settings: BaseSettings,
    seeds: int,
    steps: int,
    seconds: float | None,
    part: tuple[int, int, str | None],
) -> None:
    began = time.monotonic()
    number, parts, side = part
    if not seeds:
        # The bases alone, which parts would train all at once.
        for family in families.NAMES[number - 1 :: parts]:
            families.prepare(out, family, settings, lambda: build(data).base_texts)
    wanted = list(families.jobs(seeds))
    for family, job in wanted[number - 1 :: parts]:
        folder = families.folder_of(out, family)
        of_family = [planned for other, planned in wanted if other == family]
        if job.key(steps) in _finished(folder, of_family, steps, side):
            continue
        if seconds is not None and time.monotonic() - began > seconds:
            print("stopped: the time is up; call again to go on")
            return
        families.prepare(out, family, settings, lambda: build(data).base_texts)
        _keep(runs.run(folder, job, steps, settings.hidden_size, side), families.results_of(out, family, side))


def _measure_operators(out: Path) -> None:
    from benchmarks.study import operator_cost

    path = out / report.OPERATOR_COST_FILE
    if path.exists():
        return
    runs.register()
    costs = operator_cost.measure(out / "base", SWEEPS["hio"].methods, "the default")
    write_text(path, json.dumps(costs, indent=2) + "\n")


def _operator_costs(out: Path) -> dict[str, Any]:
    path = out / report.OPERATOR_COST_FILE
    costs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return costs


def _keep(lines: list[dict[str, Any]], results: Path) -> None:
    for line in lines:
        print(json.dumps({key: value for key, value in line.items() if key != "machine"}), flush=True)
    # Whole: a line that was cut off by the machine's end would end every later call.
    write_text(results, "".join(json.dumps(each) + "\n" for each in [*report.read(results), *lines]))


if __name__ == "__main__":
    typer.run(main)
