"""Collect all measurements of the demo on the real model from its files into one document: report.json."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pat_serve.demo.tiny.findings import metrics_of, without_rounds
from pat_serve.machine.hardware import describe

# The texts stand in the order in which the demo gives them to pat-eval.
MEASURED_ON = ("held-out answers", "Python's reference")
_SIZES = {
    "hidden_size": "channels",
    "num_hidden_layers": "layers",
    "intermediate_size": "FFN channels",
    "num_key_value_heads": "key-value heads",
}


def collect(out: Path) -> dict[str, Any]:
    """Make report.json from a finished demo's folder. Only sums and ratios of measured figures are computed here."""
    record = _json(out / "pruned" / "pat_export.json")
    talk = _json(out / "talk.json")
    return {
        "version": 1,
        "demo": "real",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "plan": _json(out / "plan.json"),
        "models": {
            "parent": {
                "parameters": record["parameters"]["base"],
                "shape": {setting: sizes["base"] for setting, sizes in record["shape"].items()},
            },
            "pruned": {
                "parameters": record["parameters"]["exported"],
                "shape": {setting: sizes["exported"] for setting, sizes in record["shape"].items()},
                "weights_bytes": sum(path.stat().st_size for path in (out / "pruned").glob("*.safetensors")),
            },
        },
        "parity": record["parity"],
        "quality": {
            of: _results(measure)
            for of, measure in zip(MEASURED_ON, _json(out / "quality.json")["measures"], strict=True)
        },
        "facts": {name: sum(fact["answers"][name]["right"] for fact in talk["facts"]) for name in ("parent", "pruned")}
        | {"asked": len(talk["facts"])},
        "talk": talk["conversations"],
        "fact_answers": talk["facts"],
        "speedup": without_rounds(talk["speedup"]),
        "training": metrics_of(out / "run" / "metrics.jsonl"),
        "stage_s": _json(out / "timings.json"),
    }


def summary_lines(out: Path) -> list[str]:
    """Tell the outcome in a few lines for the terminal."""
    findings = _json(out / "report.json")
    models, facts, plan = findings["models"], findings["facts"], findings["plan"]
    lines = [
        "",
        f"trained:     {plan['steps']} steps of {plan['rows_per_step']} conversations, of {plan['rows']}",
        f"cut:         {told_cut(models['parent']['shape'], models['pruned']['shape'])}; "
        f"parameters {models['parent']['parameters']:,} -> {models['pruned']['parameters']:,} "
        f"({models['pruned']['parameters'] / models['parent']['parameters'] - 1:+.1%})",
        f"facts:       of {facts['asked']}, the parent knows {facts['parent']} and the pruned model {facts['pruned']}",
    ]
    for name, results in findings["quality"].items():
        parent, pruned = results["parent"]["perplexity"], results["pruned"]["perplexity"]
        lines.append(f"perplexity:  parent {parent:.2f}, pruned {pruned:.2f} ({pruned / parent - 1:+.0%}): {name}")
    for regime in findings["speedup"]["regimes"]:
        ratio = regime["ratio"]
        lines.append(f"{regime['regime'] + ':':12} {ratio['median']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    lines += [
        f"report:      {out / 'report.html'}",
        f"talk to it:  pat-serve --model {out / 'pruned'} --baseline {out / 'parent'}",
    ]
    return lines


def told_cut(parent: dict[str, int], pruned: dict[str, int]) -> str:
    """Tell the sizes that differ: "30 to 24 layers, 1536 to 1280 FFN channels".

    Args:
        parent: sizes by the names of config.json.
        pruned: the same of the pruned model.
    """
    return ", ".join(
        f"{parent[setting]} to {pruned[setting]} {name}"
        for setting, name in _SIZES.items()
        if parent[setting] != pruned[setting]
    )


def _results(measure: dict[str, Any]) -> dict[str, Any]:
    """Read the results of the parent and of the pruned model, in the order in which pat-eval got them."""
    return {
        name: {
            "perplexity": result["value"],
            "items": result["items"],
            **{key: result[key] for key in ("tokens", "nll_nats", "nll_standard_error_nats")},
        }
        for name, result in zip(("parent", "pruned"), measure["results"], strict=True)
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
