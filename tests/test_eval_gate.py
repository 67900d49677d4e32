from __future__ import annotations

from pathlib import Path

import pytest

from pat_serve.errors import DataError, UsageError
from pat_serve.evaluation.gate import describe, exit_code, judge, parse_bound, read_gate
from pat_serve.evaluation.report import Comparison, Measure, Result


def measure(name: str, of: str, ratio: float, low: float | None, high: float | None) -> Measure:
    versus = Comparison(ratio=ratio, low=low, high=high, p_value=0.5, test="paired bootstrap")
    results = [
        Result(model="dense", value=0.5, standard_error=0.01, items=9),
        Result(model="pruned", value=0.5 * ratio, standard_error=0.01, items=9, versus_first=versus),
    ]
    return Measure(
        name=f"{name}({of})", metric=name, of=of, higher_is_better=name != "ppl", settings={}, notes=[], results=results
    )


PPL, ACC = measure("ppl", "wikitext2", 1.01, 1.005, 1.015), measure("acc", "arc_easy", 0.95, 0.93, 0.98)


@pytest.mark.parametrize(
    ("bound", "outcome"),
    [
        ("ppl <= 1.02x", "pass"),
        ("ppl<=1.015x", "pass"),
        ("ppl(wikitext2) <= 1.01x", "inconclusive"),
        ("ppl <= 1.004x", "fail"),
        ("acc(arc_easy) >= 0.9x", "pass"),
        ("acc >= 0.97x", "inconclusive"),
        ("acc >= 0.99x", "fail"),
        # Absolute: 0.475 ± 1.96 x 0.01.
        ("acc >= 0.45", "pass"),
        ("acc >= .47", "inconclusive"),
        ("acc >= 0.5", "fail"),
    ],
)
def test_outcomes(bound: str, outcome: str):
    [result] = judge([parse_bound(bound, "x")], [PPL, ACC])
    assert (result.model, result.outcome) == ("pruned", outcome)
    assert outcome in describe(result)
    assert exit_code([result]) == {"pass": 0, "fail": 1, "inconclusive": 3}[outcome]


def test_a_miss_outweighs_what_is_unclear():
    bounds = [parse_bound(text, "x") for text in ("ppl <= 1.02x", "ppl <= 1.01x", "acc >= 0.99x")]
    assert exit_code(judge(bounds, [PPL, ACC])) == 1
    assert exit_code([]) == 0


def test_no_interval_is_inconclusive():
    [result] = judge([parse_bound("ppl <= 2x", "x")], [measure("ppl", "t", 1.0, None, None)])
    assert result.outcome == "inconclusive"


@pytest.mark.parametrize("text", ["ppl < 1.02x", "ppl 1.02", "1.02 >= ppl", "ppl <= -1", "ppl <= 1.02y", ""])
def test_what_is_no_bound(text: str):
    with pytest.raises(UsageError, match="METRIC"):
        parse_bound(text, "gate.yaml")


def test_a_bound_on_nothing():
    with pytest.raises(UsageError, match=r"one of what is measured: ppl\(wikitext2\), acc\(arc_easy\)"):
        judge([parse_bound("acc(piqa) >= 0.9x", "x")], [PPL, ACC])


def test_gate_files(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text("version: 1\nbounds:\n  - ppl <= 1.02x\n  - acc(arc_easy) >= 0.97x\n")
    assert [bound.text for bound in read_gate(path)] == ["ppl <= 1.02x", "acc(arc_easy) >= 0.97x"]
    for wrong in ("bounds: []", "bound: [ppl <= 1]", "- ppl", "{", "version: 2\nbounds: [ppl <= 1]"):
        path.write_text(wrong)
        with pytest.raises(DataError, match="list of bounds"):
            read_gate(path)
