"""pat-export --require-quality: measure the finished export against its base, and refuse one that lost too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pat_serve.errors import QualityError, UnclearQuality, UsageError
from pat_serve.evaluation.backends import BackendSettings
from pat_serve.evaluation.gate import Bound, describe, exit_code, judge, parse_bound
from pat_serve.evaluation.measuring import measure_models
from pat_serve.evaluation.plan import Plan
from pat_serve.evaluation.reporting import new_report
from pat_serve.machine.hardware import serving_dtype
from pat_serve.terminal.progress import say

_FLAG = "--require-quality"
_MAX_LENGTH_TOKENS = 256
_INSTRUCTIONS = (".jsonl", ".json")


def quality_gate(
    bounds: Sequence[str], data: Path | None, *, out: Path
) -> Callable[[Path, Path], dict[str, Any]] | None:
    """Make the function that `export_run` calls with the folders of the finished model and of the base.

    Args:
        bounds: as written.
        data: file to measure on.
        out: what the export will be called.

    Raises:
        UsageError: a bound cannot be read or names another figure than ppl, or there is no data.
    """
    if not bounds and data is None:
        return None
    if not bounds or data is None:
        raise UsageError(
            "--quality-data" if data is None else _FLAG,
            expected=f"{_FLAG} and --quality-data together",
            found="one of them",
            fix=f'Give both: {_FLAG} "ppl<=1.02x" --quality-data heldout.jsonl.',
        )
    parsed = [parse_bound(text, _FLAG) for text in bounds]
    for bound in parsed:
        if bound.metric != "ppl" or bound.of not in (None, data.name):
            raise UsageError(
                _FLAG,
                expected="a bound on ppl, of --quality-data",
                found=bound.text,
                fix="Give other measures to pat-eval --gate.",
            )
    plan = _plan(data)

    def accept(exported: Path, base: Path) -> dict[str, Any]:
        return _measure(exported, base, parsed, plan, out)

    return accept


def _plan(data: Path) -> Plan:
    from pat_serve.cli.eval_data import responses_of, text_of
    from pat_serve.training.data import load_tokenizer

    instructions = data.suffix in _INSTRUCTIONS
    return Plan(
        responses=responses_of(str(data), "test", None, _MAX_LENGTH_TOKENS) if instructions else None,
        texts=() if instructions else (text_of(data),),
        backend=BackendSettings(dtype=serving_dtype()),
        load_tokenizer=load_tokenizer,
    )


def _measure(exported: Path, base: Path, bounds: Sequence[Bound], plan: Plan, out: Path) -> dict[str, Any]:
    # Others read these names on the card, so they are no paths of this machine.
    names = ["the base", out.name]
    models, measures = measure_models(names, plan, {names[0]: base, names[1]: exported})
    judged = judge(bounds, measures)
    for result in judged:
        say(describe(result))
    missed = [describe(result) for result in judged if result.outcome != "pass"]
    if missed:
        error = QualityError if exit_code(judged) == 1 else UnclearQuality
        raise error(
            out,
            expected="; ".join(bound.text for bound in bounds),
            found="; ".join(missed),
            fix="Nothing was exported. Train longer or prune less, or give more data where it is inconclusive.",
        )
    return new_report(models, measures, judged).model_dump(mode="json")
