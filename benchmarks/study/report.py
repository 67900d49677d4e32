"""Table and curve of the study, from results.jsonl."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DENSE = "dense LoRA"
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """All results so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(lines: list[Line]) -> str:
    """Markdown: means over seeds ± standard deviations; distances to dense LoRA are paired by seed."""
    measures = _measures(lines)
    dense = {line["seed"]: line for line in lines if line["method"] == DENSE}
    head = ["cut", "method", "seeds", "parameters", *measures, "times as fast"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (ratio, method), own in _groups(lines):
        cells = [f"{ratio:.1%}", method, str(len(own))]
        cells.append(f"{own[0]['parameters']:,}" if "parameters" in own[0] else "")
        for measure in measures:
            cell = spread([line[measure] for line in own], "{:.3f}" if measure.startswith("acc") else "{:.2f}")
            pairs = [line[measure] / dense[line["seed"]][measure] - 1 for line in own if line["seed"] in dense]
            if pairs and method != DENSE:
                cell += f" ({spread([100 * pair for pair in pairs], '{:+.1f}')} %)"
            cells.append(cell)
        fast = [line["speedup"] for line in own if "speedup" in line]
        rows.append("| " + " | ".join([*cells, spread(fast, "{:.3f}") if fast else ""]) + " |")
    return "\n".join(rows)


def write_curve(lines: list[Line], path: Path) -> None:
    """A self-contained page: perplexity lost against the share of parameters, a line a method, bars over seeds."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return
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
