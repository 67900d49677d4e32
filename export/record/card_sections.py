"""Speed and quality of an export for its model card, from what pat-bench and pat-eval wrote about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pat_serve.errors import PatServeError, RunError, first_line
from pat_serve.export.record.card import model_card
from pat_serve.files.atomic import write_text

# Sizes by which a measurement's model is known, and its names for them; layers may have been cut to measure.
_MEASURED = {"hidden_size": "hidden_size", "intermediate_size": "ffn_size", "num_key_value_heads": "num_kv_heads"}


def rewrite_card(folder: Path, *, speedup: Path | None = None, quality: Path | None = None) -> None:
    """Write an export's README.md anew, with what was measured since.

    Args:
        folder: an export.
        speedup: JSON of `pat-bench speedup`, with this model as the candidate.
        quality: JSON of `pat-eval --json`.

    Raises:
        RunError: not an export, or not such a file, or one about a model of another width.
    """
    record = _read(folder / "pat_export.json", "an export's pat_export.json")
    sections = []
    try:
        if speedup is not None:
            sections.append(_speed(_read(speedup, "JSON of pat-bench speedup"), record, speedup))
        if quality is not None:
            sections.append(_quality(_read(quality, "JSON of pat-eval --json"), record, quality))
        elif record.get("quality"):
            sections.append(quality_section(record["quality"]))
        card = model_card(record, "\n\n".join(sections) or None)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            speedup or quality or folder,
            expected="the JSON that pat-export, pat-bench speedup or pat-eval --json writes",
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="Give the files that these commands wrote.",
        ) from error
    write_text(folder / "README.md", card)


def _speed(result: dict[str, Any], record: dict[str, Any], path: Path) -> str:
    for setting, name in _MEASURED.items():
        measured, exported = result["candidate"]["shape"].get(name), record.get("shape", record).get(setting)
        if measured and exported and measured != exported["exported"]:
            expected = f"a measurement of a model of {setting} {exported['exported']}"
            raise _mismatch(path, expected, f"{setting} {measured}")
    machine = result["machine"]
    # Where models are cut, the check also says where their lines lead for the whole ones.
    cut = f", {result['candidate']['shape']['num_layers']} layers" if result.get("extrapolated") else ""
    rows = [
        f"| {phase['regime']}, {phase['candidate']['layers']} layers, extrapolated | {phase['batch_size']} x "
        f"{phase['context_tokens']:g} | {phase['ratio']['median']:.3f} | "
        f"{phase['ratio']['low']:.3f} to {phase['ratio']['high']:.3f} | {phase['ceiling']:.3f} |"
        for phase in result.get("extrapolated", ())
    ]
    rows += [
        f"| {phase['regime']}{cut} | {phase['batch_size']} x {phase['context_tokens']:g} "
        f"| {phase['ratio']['median']:.3f} | "
        f"{phase['ratio']['low']:.3f} to {phase['ratio']['high']:.3f} | {phase['ceiling']:.3f} |"
        for phase in result["regimes"]
    ]
    return "\n".join(
        [
            f"Speed against {Path(result['baseline']['name']).name}, {result['dtype']}, vLLM {machine['vllm']}, "
            f"{machine['cpu_model']} ({machine['cpu_cores']} cores), accelerator {machine['accelerator']}, "
            f"{result['date'][:10]}:",
            "",
            "| phase | requests x context | times as fast | 95 % interval | arithmetic's limit |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def quality_section(report: dict[str, Any]) -> str:
    """Every measure of a report of pat-eval, as a table of the card."""
    rows = []
    for measure in report["measures"]:
        for result in measure["results"]:
            versus = result["versus_first"] or {}
            interval = f"{versus['low']:.3f} to {versus['high']:.3f}" if versus.get("low") is not None else ""
            ratio = f"{versus['ratio']:.3f}x" if versus.get("ratio") is not None else ""
            rows.append(
                f"| {measure['name']} | {Path(result['model']).name} | {result['value']:.4g} | {ratio} | {interval} "
                f"| {result['items']} |"
            )
    return "\n".join(
        [
            f"Quality, by pat-eval, {report['date'][:10]}; each model against the first on the same items:",
            "",
            "| measure | model | value | to the first | 95 % interval | items |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _quality(report: dict[str, Any], record: dict[str, Any], path: Path) -> str:
    width = record["hidden_size"]["exported"]
    widths = [model["hidden_size"] for model in report["models"]]
    if width not in widths:
        raise _mismatch(path, f"a report with a model of hidden_size {width} in it", f"hidden_size {widths}")
    return quality_section(report)


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _mismatch(path, expected, first_line(error)) from error
    if not isinstance(content, dict):
        raise _mismatch(path, expected, type(content).__name__)
    return content


def _mismatch(path: Path, expected: str, found: str) -> PatServeError:
    return RunError(path, expected=expected, found=found, fix="Give the file that the command wrote about this model.")
