"""Collect all measurements of the demo from its files into one document: report.json."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pat_serve.machine.hardware import describe
from pat_serve.training.model.calibration import Calibration


def collect(out: Path) -> dict[str, Any]:
    """Make report.json from a finished demo's folder. Only ratios of measured figures are computed here."""
    exports = {name: _json(out / name / "pat_export.json") for name in ("dense", "pruned")}
    names = ("base", "dense", "pruned")
    return {
        "version": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "models": {
            "base": {
                "parameters": exports["pruned"]["parameters"]["base"],
                "hidden_size": exports["pruned"]["hidden_size"]["base"],
            },
            **{
                name: {
                    "parameters": record["parameters"]["exported"],
                    "hidden_size": record["hidden_size"]["exported"],
                    "method": record["method"],
                    "parity": record["parity"],
                    "weights_bytes": sum(path.stat().st_size for path in (out / name).glob("*.safetensors")),
                }
                for name, record in exports.items()
            },
        },
        "quality": dict(zip(names, _perplexities(out / "quality.json"), strict=True)),
        "training": {method: metrics_of(out / "runs" / method / "metrics.jsonl") for method in ("lora", "pat")},
        "axes": axis_importances(out / "runs" / "pat"),
        "serving": _json(out / "answers.json"),
        "speedup": without_rounds(_json(out / "speedup.json")),
        "stage_s": _json(out / "timings.json"),
    }


def _perplexities(report: Path) -> list[dict[str, Any]]:
    """Read each model's perplexity from the one measure of pat-eval's report."""
    [measure] = _json(report)["measures"]
    return [
        {
            "perplexity": result["value"],
            "examples": result["items"],
            **{name: result[name] for name in ("tokens", "nll_nats", "nll_standard_error_nats")},
        }
        for result in measure["results"]
    ]


def axis_importances(run: Path) -> list[float]:
    """Read the importance of each axis of the stream as the run measured it, the strongest first."""
    calibration = Calibration.load(run)
    assert calibration is not None
    importances: list[float] = calibration.importance_D.sort(descending=True).values.tolist()
    return importances


def summary_lines(out: Path) -> list[str]:
    """Tell the outcome in a few lines for the terminal."""
    findings = _json(out / "report.json")
    models, quality, speedup = findings["models"], findings["quality"], findings["speedup"]
    parity = models["pruned"]["parity"]
    lines = [
        "",
        f"parity:      max logit difference {parity['max_abs_over_std']:.1e} of the logits' standard deviation "
        f"({parity['dtype']}, {parity['positions']} positions)",
        f"parameters:  {models['dense']['parameters']:,} -> {models['pruned']['parameters']:,} "
        f"({models['pruned']['parameters'] / models['dense']['parameters']:.1%})",
        "perplexity:  " + ", ".join(f"{name} {result['perplexity']:.2f}" for name, result in quality.items()),
    ]
    for regime in speedup["regimes"]:
        ratio = regime["ratio"]
        lines.append(
            f"{regime['regime'] + ':':12} {ratio['median']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}], ceiling "
            f"{regime['ceiling']:.3f}x: {regime['verdict']}"
        )
    lines.append(f"claim {speedup['settings']['claim']}x: {speedup['verdict']}")
    lines.append(f"report:      {out / 'report.html'}")
    return lines


def metrics_of(path: Path) -> list[dict[str, float]]:
    """Read the lines of a run's metrics.jsonl that have losses."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "cross_entropy" in line]


def without_rounds(result: dict[str, Any]) -> dict[str, Any]:
    """Replace the rounds by their number in the report; their raw timestamps stay in speedup.json."""
    return dict(result, rounds=len(result["rounds"]))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
