"""The rows as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADS = (
    "method", "what gets smaller", "trains", "minutes", "parameters", "zeros", "bytes a token", "perplexity", "tasks",
    "nats of the right answers",
    "prefill, decode in vLLM", "source",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, in the order of the rows."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    measures = row["measures"]
    perplexity = measures["ppl(wikitext2)"]
    # The group's own figures, which are means over its tasks.
    accuracy, answers = (measures.get(f"{name}(pat14_ll)") for name in ("acc", "answer_nll"))
    minutes = f"{row['train_s'] / 60:.1f}" if "train_s" in row else ""
    return (
        row["name"],
        row["axes"],
        "yes" if row["trains"] else "no",
        minutes,
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['zeros']:.0%}" if row["zeros"] else "",
        f"{row['decode_bytes'] / 1e6:.0f} MB",
        f"{perplexity:.2f}",
        "" if accuracy is None else f"{accuracy:.3f}",
        "" if answers is None else f"{answers:.2f}",
        _speed(row),
        row["source"],
    )


def _speed(row: Mapping[str, Any]) -> str:
    speed = row.get("speed")
    if speed:
        return ", ".join(f"{speed[phase]['median']:.2f}x" for phase in ("prefill", "decode") if phase in speed)
    if row["zeros"]:
        return "1x: zeros are computed"
    return "1x: the same sizes" if speed is not None and row["trains"] else ""
