"""The comparisons of a parity check as a few lines for a terminal or a log."""

from __future__ import annotations

from pat_serve.export.parity import Comparison, Parity

_HEADER = ("model, computed in", "max diff / std", "mean KL, nats", "equal top-1", "greedy text", "")


def parity_lines(parity: Parity) -> list[str]:
    """A table, one line a comparison, with what each figure was allowed in brackets."""
    how = ", layer by layer" if parity.layerwise else ""
    rows = [_HEADER, *(_cells(comparison) for comparison in parity.comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"parity with the trained model on {parity.headline.positions} positions{how}:", *lines]


def _cells(comparison: Comparison) -> tuple[str, ...]:
    figures, greedy, limit = comparison.figures, comparison.greedy, comparison.tolerance
    name = f"{comparison.model}, {comparison.runtime} {comparison.dtype}"
    cells = [f"{figures.max_abs_over_std:.1e}", f"{figures.mean_kl_nats:.1e}", f"{figures.top1_agreement:.2%}"]
    if limit is not None:
        limits = [f"{limit.max_abs_over_std:.1g}", f"{limit.mean_kl_nats:.1g}", f"{limit.top1_agreement:.1%}"]
        cells = [f"{cell} [{allowed}]" for cell, allowed in zip(cells, limits, strict=True)]
    text = f"{greedy.equal}/{greedy.prompts} x {greedy.new_tokens}"
    if greedy.equal < greedy.prompts and limit is not None:
        text += ", else near ties" if greedy.passed else f", a gap of {greedy.widest_gap_over_std:.1g} std"
    verdict = "" if limit is None else ("pass" if comparison.passed else "FAIL")
    return (name, *cells, text, verdict)
