"""The table of quality against speed: which lines it takes, and what it makes of several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality_speed import rows_of, table_of, write_plot

START, SETTINGS = "calibration_rows=128", "batch_size=2"


def quality(shape: str, perplexity: float, **other: Any) -> dict[str, Any]:
    same = {"choose": "", "start": START, "settings": SETTINGS, "tokens": 100, "seed": 0, "parameters": 3_000_000}
    return {"shape": shape, "held_out_loss": 3.0, "held_out_kl": 0.5, "perplexity": perplexity, **same, **other}


def speed(shape: str, median: float, batch_size: int = 1, regime: str = "decode") -> dict[str, Any]:
    return {
        "shape": shape, "regime": regime, "batch_size": batch_size,
        "median": median, "low": median - 0.1, "high": median + 0.1,
    }  # fmt: skip


LINES = [
    quality("layers=5", 50.0, seed=1),
    quality("layers=5", 40.0),
    quality("layers=5", 42.0, seed=2),
    quality("layers=6", 30.0, parameters=4_000_000),
    quality("ffn=64", 45.0),
    # Other code, another choice, start, setting, number of tokens; and a shape of unknown speed.
    quality("layers=5", 1.0, commit="44a6ff3"),
    quality("layers=5", 1.0, choose="layers=last"),
    quality("layers=5", 1.0, start="calibration_rows=256"),
    quality("layers=5", 1.0, settings="batch_size=4"),
    quality("layers=5", 1.0, tokens=0),
    quality("hidden=8", 1.0),
]
SPEEDS = [
    speed("layers=5", 1.9),
    speed("layers=5", 1.4),
    speed("layers=5", 1.3, batch_size=8),
    speed("layers=5", 7.0, regime="prefill"),
    speed("layers=6", 1.2),
    speed("ffn=64", 1.1),
]


def test_the_table_has_equal_runs_alone():
    table = list(table_of(rows_of(LINES, SPEEDS, START, SETTINGS, 100)))
    assert table[0].startswith("| shape | parameters | decode, batch 1 | decode, batch 8 | held-out loss |")
    assert [line.split(" | ") for line in table[2:]] == [
        ["| ffn=64", "3.0 M", "1.100 (1.000 to 1.200)", "", "3.000", "0.500", "45.0", "1 |"],
        ["| layers=6", "4.0 M", "1.200 (1.100 to 1.300)", "", "3.000", "0.500", "30.0", "1 |"],
        [
            "| layers=5", "3.0 M", "1.400 (1.300 to 1.500)", "1.300 (1.200 to 1.400)", "3.000 (3.000 to 3.000)",
            "0.500 (0.500 to 0.500)", "42.0 (40.0 to 50.0)", "3 |",
        ],
    ]  # fmt: skip


def test_the_picture_has_a_line_for_every_way_to_cut(tmp_path: Path):
    write_plot(rows_of(LINES, SPEEDS, START, SETTINGS, 100), [20.0], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(f'"name":"{name}"' in page for name in ("FFN", "layers", "dense, tuned alike"))
