"""Show the comparisons of a parity check in a few lines for a terminal or a log."""

from __future__ import annotations

from pat_serve.export.parity.comparison import Comparison, Parity

_HEADER = ("model, computed in", "max diff / std", "mean KL, nats", "median KL", "equal top-1", "greedy text", "")


def parity_lines(parity: Parity) -> list[str]:
    """Make a table with one line a comparison, and the limit of each figure in brackets."""
    how = ", layer by layer" if parity.layerwise else ""
    rows = [_HEADER, *(_cells(comparison) for comparison in parity.comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"parity with the trained model on {parity.headline.positions} positions{how}:", *lines, *parity.notes]


def _cells(comparison: Comparison) -> tuple[str, ...]:
    figures, limit = comparison.figures, comparison.tolerance
    name = f"{comparison.model}, {comparison.runtime} {comparison.dtype}"
    allowed = (
        (None, None, None, None)
        if limit is None
        else (limit.max_abs_over_std, limit.mean_kl_nats, limit.median_kl_nats, limit.top1_agreement)
    )
    cells = (
        _cell(f"{figures.max_abs_over_std:.1e}", allowed[0]),
        _cell(f"{figures.mean_kl_nats:.1e}", allowed[1]),
        _cell(f"{figures.median_kl_nats:.1e}", allowed[2]),
        _cell(f"{figures.top1_agreement:.2%}", allowed[3], ".1%"),
    )
    verdict = "" if limit is None else ("pass" if comparison.passed else "FAIL")
    return (name, *cells, _text(comparison), verdict)


def _cell(figure: str, allowed: float | None, form: str = ".1g") -> str:
    return figure if allowed is None else f"{figure} [{allowed:{form}}]"


def _text(comparison: Comparison) -> str:
    greedy = comparison.greedy
    if greedy is None:
        return ""
    text = f"{greedy.equal}/{greedy.prompts} x {greedy.new_tokens}"
    if greedy.equal == greedy.prompts or greedy.allowed_gap_over_std is None:
        return text
    return f"{text}, else near ties" if greedy.passed else f"{text}, a gap of {greedy.widest_gap_over_std:.1g} std"
