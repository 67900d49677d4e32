"""Recorded results, read back from their JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pat_serve.errors import UsageError, first_line
from pat_serve.server.bench.equal_memory.result import EqualMemoryResult
from pat_serve.server.bench.latency.result import LatencyResult, ThroughputResult
from pat_serve.server.bench.load.result import LoadResult
from pat_serve.server.bench.planning.result import PlanResult
from pat_serve.server.bench.speculative.result import SpeculativeResult
from pat_serve.server.bench.speedup.result import SpeedupResult

Recorded = (
    SpeedupResult | LatencyResult | ThroughputResult | LoadResult | EqualMemoryResult | SpeculativeResult | PlanResult
)
_KINDS: dict[str, type[Recorded]] = {
    "speedup": SpeedupResult,
    "latency": LatencyResult,
    "throughput": ThroughputResult,
    "load": LoadResult,
    "equal-memory": EqualMemoryResult,
    "speculative": SpeculativeResult,
    "plan": PlanResult,
}


@dataclass(frozen=True, kw_only=True)
class QualityFigure:
    """One model's figure from a pat-eval report.

    Attributes:
        measure: name of the measure, such as ppl(heldout.jsonl).
        model: its name.
        value: the figure.
        standard_error: standard error of the value; None where there is none.
    """

    measure: str
    model: str
    value: float
    standard_error: float | None


def read_result(path: Path) -> Recorded:
    """Read a result of pat-bench.

    Raises:
        UsageError: the file is not there, is no JSON, or is no result of this version.
    """
    value = _json(path)
    kind = _KINDS.get(value.get("kind", "")) if isinstance(value, dict) else None
    if kind is None:
        raise UsageError(
            path,
            expected="a result that pat-bench wrote with --out",
            found="JSON of another kind",
            fix=f"Give files with kind {', '.join(_KINDS)}; a pat-eval report goes to --quality.",
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        version, own = value.get("schema_version"), kind.model_fields["schema_version"].default
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UsageError(
            path,
            expected=f"schema_version {own}",
            found=f"schema_version {version}" if version != own else f"{where}: {detail['msg']}",
            fix="Measure again with this version of pat-serve.",
        ) from error


def read_quality(path: Path) -> list[QualityFigure]:
    """Read the figures of a pat-eval JSON report.

    Raises:
        UsageError: the file is not there, is no JSON, or is no such report.
    """
    value = _json(path)
    try:
        if "measures" in value:
            return [
                QualityFigure(
                    measure=measure["name"],
                    model=one["model"],
                    value=float(one["value"]),
                    standard_error=one.get("standard_error"),
                )
                for measure in value["measures"]
                for one in measure["results"]
            ]
        return [
            QualityFigure(
                measure=f"ppl({Path(str(value['data'])).name})",
                model=one["model"],
                value=float(one["perplexity"]),
                standard_error=one["nll_standard_error_nats"] * one["perplexity"],
            )
            for one in value["results"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"--quality {path}", expected="a report of pat-eval --json", found="JSON of another kind", fix="Name one."
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = "no such file"
    except OSError as error:
        found = first_line(error)
    except ValueError:
        found = "something that is no JSON"
    raise UsageError(path, expected="a JSON file", found=found, fix="Write one with pat-bench ... --out FILE.json.")
