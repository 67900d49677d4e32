"""Quality against measured speed, of every way to cut at every size that was measured: a table, and a picture.

    python -m benchmarks.quality_speed --quality recovery.jsonl --speed speed.jsonl --plot curve.html

Reads what `benchmarks.recovery` wrote, and lines of `pat-bench speedup` (shape, regime, batch_size, median, low, high).
Rows have one start and one setting, so that all shapes saw equal tokens; what has several seeds is told by its median
and its range.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pat_serve.shapes.shape import parse_shape

_RESULTS = Path(__file__).parent / "results" / "cpu"
# The picture's legend names the axes that a line of shapes cuts.
_TOLD = {"hidden": "a narrower stream", "layers": "layers", "ffn": "FFN", "layers,ffn": "layers and FFN"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A shape, what it keeps and how fast it is.

    Attributes:
        shape: as `--shape` takes it.
        parameters: of the cut model.
        seeds: that were measured.
        figures: values of held_out_loss, held_out_kl and perplexity, one a seed, ascending.
        decode: median, low and high over the dense model's speed, by batch size.
    """

    shape: str
    parameters: int
    seeds: int
    figures: dict[str, list[float]]
    decode: dict[int, tuple[float, float, float]]

    @property
    def way(self) -> str:
        """The axes that are cut."""
        return ",".join(parse_shape(self.shape))


def rows_of(
    quality: Sequence[dict[str, Any]], speed: Sequence[dict[str, Any]], start: str, settings: str, tokens: int
) -> list[Row]:
    """The shapes that have both a quality and a speed, by their way to cut and their parameters.

    Args:
        quality: lines of `benchmarks.recovery`.
        speed: lines of speeds; of several of a shape the last counts.
        start: settings that decided the cut, as the lines have them.
        settings: of the training, likewise.
        tokens: asked for, likewise.
    """
    measured: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in quality:
        same = (line["start"], line["settings"], line["tokens"]) == (start, settings, tokens)
        # A line that names a commit was made by other code than the rest.
        if same and not line["choose"] and "commit" not in line:
            measured[line["shape"]].append(line)
    decode: dict[str, dict[int, tuple[float, float, float]]] = defaultdict(dict)
    for line in speed:
        if line["regime"] == "decode":
            decode[line["shape"]][line["batch_size"]] = (line["median"], line["low"], line["high"])
    rows = [
        Row(
            shape=shape,
            parameters=lines[0]["parameters"],
            seeds=len({line["seed"] for line in lines}),
            figures={
                name: sorted(line[name] for line in lines) for name in ("held_out_loss", "held_out_kl", "perplexity")
            },
            decode=decode[shape],
        )
        for shape, lines in measured.items()
        if shape in decode
    ]
    return sorted(rows, key=lambda row: (row.way, -row.parameters))


def table_of(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines of a Markdown table."""
    batches = sorted({batch for row in rows for batch in row.decode})
    yield (
        "| shape | parameters | "
        + " | ".join(f"decode, batch {batch}" for batch in batches)
        + (" | held-out loss | KL | perplexity | seeds |")
    )
    yield "|---" * (len(batches) + 6) + "|"
    for row in rows:
        speeds = [_ratio(row.decode[batch]) if batch in row.decode else "" for batch in batches]
        kept = [_spread(row.figures[name], digits) for name, digits in
                (("held_out_loss", 3), ("held_out_kl", 3), ("perplexity", 1))]  # fmt: skip
        cells = [row.shape, f"{row.parameters / 1e6:.1f} M", *speeds, *kept, str(row.seeds)]
        yield f"| {' | '.join(cells)} |"


def _ratio(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


def _spread(values: Sequence[float], digits: int) -> str:
    told = f"{median(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


def write_plot(rows: Sequence[Row], dense: Sequence[float], path: Path) -> None:
    """A self-contained page: perplexity against the decode speed of one sequence, a line for every way to cut.

    Args:
        rows: from `rows_of`.
        dense: perplexities of the dense model tuned alike, one a seed.
        path: of the page.
    """
    import plotly.graph_objects as go

    figure = go.Figure(
        layout={
            "template": "plotly_white",
            "margin": {"t": 20, "r": 20},
            "xaxis": {"title": "decode in vLLM, times the dense model's speed (batch 1, 128 tokens)"},
            "yaxis": {"title": "perplexity of WikiText-2", "type": "log", "tickvals": list(range(20, 101, 10))},
            "legend": {"x": 0.02, "y": 0.98},
            "width": 900,
            "height": 520,
        }
    )
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        speeds = [row.decode[1] for row in own]
        values = [row.figures["perplexity"] for row in own]
        figure.add_scatter(
            name=_TOLD.get(way, way),
            x=[found[0] for found in speeds],
            y=[median(of) for of in values],
            error_x={
                "array": [high - mid for mid, _, high in speeds],
                "arrayminus": [mid - low for mid, low, _ in speeds],
            },
            error_y={
                "array": [of[-1] - median(of) for of in values],
                "arrayminus": [median(of) - of[0] for of in values],
            },
            mode="lines+markers+text",
            text=[row.shape for row in own],
            textposition="bottom center",
            textfont={"size": 10},
        )
    figure.add_scatter(
        name="dense, tuned alike", x=[1.0], y=[median(dense)], mode="markers+text", text=["dense"],
        textposition="middle right", marker={"symbol": "diamond", "size": 10},
    )  # fmt: skip
    path.write_text(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}), encoding="utf-8")


def main() -> None:
    """Print the table, and draw it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=_RESULTS / "recovery_ground.jsonl")
    parser.add_argument("--speed", type=Path, default=_RESULTS / "speed_shapes.jsonl")
    parser.add_argument("--start", default="calibration_rows=128", help="[default: calibration_rows=128]")
    parser.add_argument("--settings", default="batch_size=2,learning_rate=1.3e-3", help="of the training")
    parser.add_argument("--tokens", type=int, default=51200, help="asked for [default: 51200]")
    parser.add_argument("--plot", type=Path, help="page to write")
    options = parser.parse_args()
    quality, speed = _lines(options.quality), _lines(options.speed)
    rows = rows_of(quality, speed, options.start, options.settings, options.tokens)
    print("\n".join(table_of(rows)))
    if options.plot:
        dense = sorted(
            line["perplexity"]
            for line in quality
            if (line["shape"], line["settings"], line["tokens"]) == ("dense", options.settings, options.tokens)
        )
        write_plot(rows, dense, options.plot)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
