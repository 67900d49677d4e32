"""pat-eval: measure through the exported checkpoints what pruning kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pat_serve.cli.app import Debug, run_command

if TYPE_CHECKING:
    from pat_serve.evaluation.gate import Bound
    from pat_serve.evaluation.plan import Plan

Flag = typer.Option


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoints: folders, .gguf files, hub ids, URLs of servers; the first is the reference."),
    ],
    data: Annotated[
        str | None, Flag(help="Instructions, as a JSONL file or a hub id, for the perplexity of their responses.")
    ] = None,
    data_split: Annotated[str, Flag(help="Split of a hub dataset.")] = "test",
    text: Annotated[
        list[Path] | None, Flag(help="Any text file, or JSONL with `text` fields, for the perplexity in windows.")
    ] = None,
    wikitext2: Annotated[
        str | None, Flag(help="WikiText-2's raw test file, or `hub`, for the perplexity by the field's protocol.")
    ] = None,
    context_tokens: Annotated[
        int | None, Flag(help="Tokens of a window. [default: 2048, or the length that all models were made for]", min=8)
    ] = None,
    stride: Annotated[
        int | None,
        Flag(help="Tokens from the start of a window to that of the next. [default: windows do not overlap]", min=1),
    ] = None,
    tasks: Annotated[
        str | None,
        Flag(help="lm-eval tasks or groups, separated by commas; pat14 and pat14_ll are the paper's fourteen."),
    ] = None,
    task_data: Annotated[Path | None, Flag(help="Folder with local items of the fourteen, instead of the hub.")] = None,
    num_fewshot: Annotated[
        int | None, Flag(help="Examples before each question. [default: the task's own number]")
    ] = None,
    prompts: Annotated[
        str | None,
        Flag(
            help="Prompts to answer, for loops, length, and agreement with the first model: JSONL with `prompt` or "
            "`messages`, or `builtin`."
        ),
    ] = None,
    answer_tokens: Annotated[int, Flag(help="Tokens of an answer to a prompt, at most.", min=4)] = 128,
    temperature: Annotated[float, Flag(help="Of the sampled answers; every prompt is also answered greedily.")] = 0.7,
    arithmetic: Annotated[bool, Flag(help="Ask sums in words, answered freely; the last number is checked.")] = False,
    backend: Annotated[str, Flag(help="Library that runs checkpoints: hf (transformers) or vllm.")] = "hf",
    tokenizer: Annotated[
        str | None, Flag(help="Tokenizer of a server's model, where the model does not lie on this machine.")
    ] = None,
    limit: Annotated[
        int | None, Flag(help="Take only the first rows, windows or items of a task, so many.", min=1)
    ] = None,
    max_length_tokens: Annotated[int, Flag(help="Tokens of an example of --data.", min=8)] = 256,
    batch_size: Annotated[int, Flag(help="Examples at a time.", min=1)] = 16,
    dtype: Annotated[str, Flag(help="auto, float32 or bfloat16.")] = "auto",
    gate: Annotated[Path | None, Flag(help="YAML with bounds; exit 1 when one is missed, 3 when unclear.")] = None,
    out: Annotated[
        Path | None, Flag(help="Folder that keeps finished work and the report; a second call goes on from there.")
    ] = None,
    html: Annotated[Path | None, Flag(help="Also write the report as one HTML page.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Print JSON to stdout instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, tasks and answers of one or more checkpoints, and compare each with the first.

    Example: `pat-eval dense/ pruned/ --data heldout.jsonl`

    More: `pat-eval dense/ pruned/ --wikitext2 wiki.test.raw --tasks arc_easy,pat14_ll --out quality/ --gate gate.yaml`

    `pat-eval law run/` says how much a training run has still to gain.

    Exit codes: 0 done, 1 a bound of the gate is missed, 3 the items are too few to tell.
    """
    from pat_serve.evaluation.gate import exit_code, judge, read_gate
    from pat_serve.evaluation.measuring import measure_models
    from pat_serve.evaluation.page import render, require_plotly
    from pat_serve.evaluation.reporting import new_report
    from pat_serve.evaluation.table import print_report
    from pat_serve.files.atomic import write_text

    bounds = read_gate(gate) if gate is not None else []
    if html is not None:
        require_plotly()
    plan = _plan(
        data=data, data_split=data_split, max_length_tokens=max_length_tokens, texts=text or [], wikitext2=wikitext2,
        context_tokens=context_tokens, stride=stride, tasks=tasks, task_data=task_data, num_fewshot=num_fewshot,
        prompts=prompts, answer_tokens=answer_tokens, temperature=temperature, arithmetic=arithmetic,
        backend=backend, tokenizer=tokenizer, limit=limit, batch_size=batch_size, dtype=dtype, out=out,
    )  # fmt: skip
    _check_bounds(bounds, models, plan)
    described, measures = measure_models(models, plan)
    report = new_report(described, measures, judge(bounds, measures))
    document = report.model_dump_json(indent=2) + "\n"
    if out is not None:
        write_text(out / "eval.json", document)
    if html is not None:
        write_text(html, render(report))
    if as_json:
        sys.stdout.write(document)
    else:
        print_report(report)
    raise typer.Exit(exit_code(report.gate))


def _plan(
    *,
    data: str | None,
    data_split: str,
    max_length_tokens: int,
    texts: list[Path],
    wikitext2: str | None,
    context_tokens: int | None,
    stride: int | None,
    tasks: str | None,
    task_data: Path | None,
    num_fewshot: int | None,
    prompts: str | None,
    answer_tokens: int,
    temperature: float,
    arithmetic: bool,
    backend: str,
    tokenizer: str | None,
    limit: int | None,
    batch_size: int,
    dtype: str,
    out: Path | None,
) -> Plan:
    from pat_serve.cli.eval_data import prompts_of, responses_of, text_of, wikitext2_of
    from pat_serve.errors import UsageError, want
    from pat_serve.evaluation.answers.work import AnswerPlan
    from pat_serve.evaluation.backends import BACKENDS, BackendSettings
    from pat_serve.evaluation.lm_eval_tasks import require_lm_eval
    from pat_serve.evaluation.plan import Plan
    from pat_serve.machine.hardware import serving_dtype
    from pat_serve.training.data import load_tokenizer

    names = tuple(name for name in (part.strip() for part in (tasks or "").split(",")) if name)
    if names:
        require_lm_eval()
    if not (data or texts or wikitext2 or names or prompts or arithmetic):
        raise UsageError(
            "pat-eval",
            expected="something to measure",
            found="none of --data, --text, --wikitext2, --tasks, --prompts, --arithmetic",
            fix="Give at least one of them.",
        )
    if backend not in BACKENDS:
        raise UsageError("--backend", expected=" or ".join(BACKENDS), found=repr(backend), fix="Try --backend hf.")
    if stride is not None and context_tokens is not None and stride > context_tokens:
        raise UsageError(
            "--stride", expected=f"at most --context-tokens {context_tokens}", found=str(stride), fix="Lower it."
        )
    want("--temperature", 0 < temperature <= 2, "above 0, at most 2", temperature, "Greedy answers are written anyway.")
    return Plan(
        responses=responses_of(data, data_split, limit, max_length_tokens) if data else None,
        texts=(*([wikitext2_of(wikitext2)] if wikitext2 else []), *(text_of(path) for path in texts)),
        context_tokens=context_tokens,
        stride=stride,
        tasks=names,
        task_data=task_data,
        answers=AnswerPlan(
            prompts=prompts_of(prompts) if prompts else None,
            arithmetic=arithmetic,
            new_tokens=answer_tokens,
            temperature=temperature,
            limit=limit,
        ),
        num_fewshot=num_fewshot,
        limit=limit,
        backend=BackendSettings(
            backend=backend, dtype=serving_dtype(dtype), batch_size=batch_size, tokenizer=tokenizer
        ),
        load_tokenizer=load_tokenizer,
        out=out,
    )


def _check_bounds(bounds: list[Bound], models: list[str], plan: Plan) -> None:
    """Refuse a gate whose bounds name nothing that will be measured, before hours of measuring."""
    from pat_serve.errors import UsageError

    if bounds and len(models) < 2:
        raise UsageError(
            "--gate", expected="a reference and a model", found="one model", fix="Name the reference first."
        )
    texts = [part.name for part in (plan.responses, *plan.texts) if part is not None]
    written = plan.answers.names()
    for bound in bounds:
        if bound.metric in written and bound.of in (None, *written[bound.metric]):
            continue
        known = texts if bound.metric == "ppl" else list(plan.tasks)
        # Only lm-eval knows the names of a task's measures, and a group has members.
        named = bound.of is None or bound.of in known or bound.metric != "ppl"
        if not (known and named):
            raise UsageError(
                f"the bound {bound.text}",
                expected=f"something that is measured: {', '.join(known) or 'none is'}",
                found=bound.of or bound.metric,
                fix="Give the --data, --text, --tasks, --prompts or the like that it is about.",
            )


def main() -> None:
    """Entry point. `law` is no command of a group, so that the plain command takes models as they are."""
    if sys.argv[1:2] == ["law"]:
        from pat_serve.cli.law import main as law

        sys.argv = [f"{sys.argv[0]} law", *sys.argv[2:]]
        law()
    run_command(evaluate)
