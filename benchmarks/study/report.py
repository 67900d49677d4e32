"""Tables and curve of the study, from results.jsonl."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.methods import ALIGNED, BASE, DENSE, METHODS, SWEEPS

OPERATOR_COST_FILE = "operator-cost.json"
Line = dict[str, Any]
Cell = Callable[[list[Line]], str]


def read(path: Path) -> list[Line]:
    """Read all results so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_all(folder: Path) -> list[Line]:
    """The results of a study's folder, those of parts that ran side by side too; of a run done twice the last."""
    lines = [line for path in sorted(folder.glob("results*.jsonl")) for line in read(path)]
    return list({(line["method"], line["ratio"], line["seed"], line["steps"]): line for line in lines}.values())


def tables(lines: list[Line], operator_costs: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Markdown: the curve, and every sweep of which there is a line that is not the curve's.

    Args:
        lines: of one number of steps.
        operator_costs: as `operator_cost.measure` gives them.
    """
    sections = [f"### The curve\n\n{table(of_curve(lines))}"]
    for name, sweep in SWEEPS.items():
        if not any(_trained(line["method"]) in sweep.methods.keys() - METHODS.keys() - {DENSE} for line in lines):
            continue
        # In the sweep's order, and at its ratios; dense LoRA above them all.
        wanted = dict.fromkeys([DENSE, *(each for method in sweep.methods for each in (method, method + ALIGNED))])
        own = [
            line
            for method in wanted
            for line in lines
            if line["method"] == method and line["ratio"] in (0.0, *sweep.ratios)
        ]
        sections.append(f"### {sweep.question}\n\n{table(own, _COLUMNS[name](operator_costs or {}))}")
    return "\n\n".join(sections)


def of_curve(lines: list[Line]) -> list[Line]:
    """Select the lines of the curve's methods."""
    return [line for line in lines if line["method"] in (DENSE, BASE, *METHODS)]


def table(lines: list[Line], columns: Mapping[str, Cell] | None = None) -> str:
    """Markdown: means over seeds ± standard deviations; distances to dense LoRA are paired by seed.

    Args:
        lines: what to show, in the order of their ratios.
        columns: further ones, by their heads: what makes a cell of a row's lines.
    """
    columns = columns or {}
    measures = _measures(lines)
    dense = {line["seed"]: line for line in lines if line["method"] == DENSE}
    head = ["cut", "method", "seeds", "parameters", *measures, "times as fast", *columns]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (ratio, method), every in _groups(lines):
        # A run that diverged has no other figure.
        own = [line for line in every if "diverged" not in line]
        counted = str(len(own)) if own == every else f"{len(own)}, and {len(every) - len(own)} diverged"
        cells = [f"{ratio:.1%}", method, counted]
        cells.append(f"{own[0]['parameters']:,}" if own and "parameters" in own[0] else "")
        for measure in measures:
            cell = _mean(own, measure, "{:.3f}" if measure.startswith("acc") else "{:.2f}")
            pairs = [
                line[measure] / dense[line["seed"]][measure] - 1
                for line in own
                if measure in line and measure in dense.get(line["seed"], {})
            ]
            if pairs and method != DENSE:
                cell += f" ({spread([100 * pair for pair in pairs], '{:+.1f}')} %)"
            cells.append(cell)
        cells += [_mean(own, "speedup", "{:.3f}"), *(cell_of(own) for cell_of in columns.values())]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cost_columns(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    def of(lines: list[Line], form: str) -> str:
        cost = costs.get(lines[0]["method"]) if lines else None
        return form.format(**cost) if cost else ""

    return {
        "trained numbers": lambda lines: of(lines, "{trained_parameters:,}"),
        "a step, to the default's": lambda lines: of(lines, "{relative:.3f} [{low:.3f}, {high:.3f}]"),
    }


def _course_columns(_costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    def polarised(lines: list[Line]) -> str:
        known = [line for line in lines if "polarised_step" in line]
        steps = [float(line["polarised_step"]) for line in known if line["polarised_step"] is not None]
        if not known:
            return ""
        return f"{len(steps)} of {len(known)}" + (f", at step {spread(steps, '{:.0f}')}" if steps else "")

    return {
        "gate moved at the freeze": lambda lines: _mean(lines, "gate_freeze_gap", "{:.3f}"),
        "polarised before the freeze": polarised,
        "largest gradient norm": lambda lines: _mean(lines, "grad_norm_max", "{:.2f}"),
    }


def _mask_columns(_costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    return {"of them not zero": lambda lines: _mean(lines, "nonzero_parameters", "{:,.0f}")}


_COLUMNS: dict[str, Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Cell]]] = {
    "hio": _cost_columns,
    "identity": _course_columns,
    "masks": _mask_columns,
    "head": lambda _costs: {},
    "rates": lambda _costs: {},
    "calibration": lambda _costs: {},
}


def write_curve(lines: list[Line], path: Path) -> None:
    """A self-contained page: perplexity lost against the share of parameters, a line a method, bars over seeds."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return
    lines = [line for line in lines if "diverged" not in line]
    dense = {line["seed"]: line for line in lines if line["method"] == DENSE}
    parts = []
    for measure in _measures(lines):
        figure = go.Figure(
            layout={
                "template": "plotly_white",
                "title": measure,
                "xaxis": {"title": "parameters, of the dense model's"},
                "yaxis": {"title": "to dense LoRA (%)"},
            }
        )
        for method in dict.fromkeys(line["method"] for line in lines if line["ratio"] > 0):
            points = []
            for (_, name), own in _groups(lines):
                paired = [line for line in own if line["seed"] in dense]
                if name != method or not paired:
                    continue
                lost = [100 * (line[measure] / dense[line["seed"]][measure] - 1) for line in paired]
                share = paired[0]["parameters"] / dense[paired[0]["seed"]]["parameters"]
                points.append((share, statistics.mean(lost), statistics.stdev(lost) if len(lost) > 1 else 0.0))
            if points:
                x, y, bars = zip(*sorted(points), strict=True)
                figure.add_scatter(x=x, y=y, error_y={"array": bars}, name=method)
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts))
    path.write_text(f"<!doctype html><meta charset='utf-8'><title>study</title>{''.join(parts)}", encoding="utf-8")


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else mean


def _mean(lines: list[Line], key: str, form: str) -> str:
    """Mean and spread of a figure over the lines; empty where no line has it."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return spread(values, form) if values else ""


def _trained(method: str) -> str:
    return method.removesuffix(ALIGNED)


def _measures(lines: list[Line]) -> list[str]:
    found = [
        key for line in lines for key in line if key.startswith(("ppl(", "acc(", "answer_nll(")) and key[-1] == ")"
    ]
    return list(dict.fromkeys(found))


def _groups(lines: list[Line]) -> Iterable[tuple[tuple[float, str], list[Line]]]:
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["ratio"], line["method"]), []).append(line)
    return sorted(groups.items(), key=lambda item: item[0][0])
