"""Write the small demo's report.html, one self-contained page. Every figure comes from report.json."""

from __future__ import annotations

from html import escape
from typing import Any

from pat_serve.demo.charts import axes_chart, loss_chart, quality_chart, speedup_chart
from pat_serve.demo.report_parts import Html, cards, colored, figure, measured_ratio, ms, note, page, plain, table


def render(findings: dict[str, Any]) -> str:
    """Render the page from the findings."""
    sections = [_head(findings), _cards(findings), _quality(findings), _training(findings), _speedup(findings),
                _answers(findings), _latency(findings), _method(findings)]  # fmt: skip
    return page("pat-serve demo report", sections)


def _head(findings: dict[str, Any]) -> str:
    widths = [findings["models"][name]["hidden_size"] for name in ("base", "pruned")]
    machine = findings["machine"]
    return (
        "<h1>A Llama, a quarter narrower, and what that did</h1>"
        f"<p class='lead'>Hidden size {widths[0]} to {widths[1]} while it was being fine-tuned. "
        f"{escape(findings['date'])}, {escape(str(machine['cpu_model']))}, {machine['cpu_cores']} cores.</p>"
    )


def _cards(findings: dict[str, Any]) -> str:
    models, quality, speedup = findings["models"], findings["quality"], findings["speedup"]
    share = models["pruned"]["parameters"] / models["dense"]["parameters"]
    parity = models["pruned"]["parity"]
    gap = quality["pruned"]["perplexity"] / quality["dense"]["perplexity"] - 1
    items = (
        (f"claim {speedup['settings']['claim']}x: {colored(speedup['verdict'])}", "speed-up on the cut 7B shapes"),
        (
            f"{parity['max_abs_over_std']:.1e}",
            "largest logit difference between the trained and the exported model, of the logits' standard deviation",
        ),
        (f"{share:.1%}", f"of the dense parameters: {models['pruned']['parameters']:,}"),
        (f"{gap:+.1%}", "held-out perplexity, pruned against dense LoRA at the same budget"),
    )
    return cards(items)


def _quality(findings: dict[str, Any]) -> str:
    titles = {"base": "base", "dense": "base + LoRA, dense", "pruned": "base + PAT, pruned"}
    rows = [
        [
            titles[name],
            findings["models"][name]["hidden_size"],
            f"{findings['models'][name]['parameters']:,}",
            f"{result['perplexity']:.2f}",
            f"{result['nll_nats']:.3f} ± {result['nll_standard_error_nats']:.3f}",
        ]
        for name, result in findings["quality"].items()
    ]
    first = findings["quality"]["base"]
    told = (
        f"First docstring sentences of modules that no training saw: {first['examples']} rows, {first['tokens']} "
        "response tokens, through the exported checkpoints in stock transformers."
    )
    rows_table = table(["model", "#hidden size", "#parameters", "#perplexity", "#nats per token ± s.e."], rows)
    chart = figure(quality_chart(findings["quality"]), first_on_page=True)
    return f"<h2>Quality</h2>{rows_table}{note(told)}{chart}"


def _training(findings: dict[str, Any]) -> str:
    training, kept = findings["training"], findings["models"]["pruned"]["hidden_size"]
    cut = sum(findings["axes"][kept:])
    told = (
        "Equal steps, tokens and LoRA for both. PAT first turns the residual stream to the axes of its energy and of "
        f"the loss's gradient; the weakest, with {cut:.1%} of both, are cut before the first step, and least squares "
        "make up for them in the weights."
    )
    axes = axes_chart(findings["axes"], kept)
    charts = f"<div>{figure(loss_chart(training))}</div><div>{figure(axes)}</div>"
    return f"<h2>Training</h2><div class='two'>{charts}</div>{note(told)}"


def _speedup(findings: dict[str, Any]) -> str:
    speedup = findings["speedup"]
    settings = speedup["settings"]
    rows = [
        [
            regime["regime"],
            f"{regime['batch_size']} x {regime['context_tokens']:g}",
            *measured_ratio(regime),
        ]
        for regime in speedup["regimes"]
    ]
    headers = ["regime", "#batch x context", "#dense ms", "#pruned ms", "#ratio, 95 % interval", "#ceiling", "verdict"]
    told = (
        f"{speedup['baseline']['name']} against {speedup['candidate']['name']}, {settings['layers']} layers, random "
        f"weights, {speedup['dtype']}, {speedup['rounds']} interleaved pairs, one vLLM process each, the same token "
        "ids. The KV cache does not shrink, so the ceiling falls with batch and context."
    )
    return (
        f"<h2>Speed-up: {colored(speedup['verdict'])}</h2><p>{escape(speedup['reason'])}</p>"
        f"{table([*headers, 'why'], rows)}{figure(speedup_chart(speedup))}{note(told)}"
    )


def _answers(findings: dict[str, Any]) -> str:
    rows = [
        [
            Html(f"<pre>{escape(question['prompt'].splitlines()[1])}</pre>"),
            question["reference"],
            question["answers"]["dense"]["text"].strip(),
            question["answers"]["pruned"]["text"].strip(),
        ]
        for question in findings["serving"]["questions"]
    ]
    told = (
        "Greedy, from held-out modules, through POST /generate. A base of this size, trained for minutes, knows the "
        "form of a docstring and little of the world: compare the two columns, not either with the truth."
    )
    rows_table = table(["signature", "its docstring", "dense", "pruned"], rows)
    return f"<h2>The same questions over HTTP</h2>{rows_table}{note(told)}"


def _latency(findings: dict[str, Any]) -> str:
    rows = [
        [
            name,
            ms(figures["summary"]["ttft_s"]["median"]),
            ms(figures["summary"]["tpot_s"]["median"]),
            f"{figures['summary']['output_tokens_per_s']['median']:.0f}",
        ]
        for name, figures in findings["serving"]["latency"].items()
    ]
    told = (
        "Medians from POST /benchmark/latency, one request at a time, 128 prompt and 32 output tokens, both servers up "
        "on the same cores. Models this small spend their time outside matrix products: the speed-up is judged above."
    )
    rows_table = table(["model", "#TTFT ms", "#TPOT ms", "#output tokens/s"], rows)
    return f"<h2>Latency of the small models</h2>{rows_table}{note(told)}"


def _method(findings: dict[str, Any]) -> str:
    stages = table(["stage", "#seconds"], [[name, f"{seconds:.0f}"] for name, seconds in findings["stage_s"].items()])
    machine = table(["machine", ""], [[key, plain(value)] for key, value in findings["machine"].items()])
    told = (
        "All figures: report.json. Raw timestamps: speedup.json. The demo printed its commands, and runs/*/recipe.yaml "
        "repeats a training."
    )
    return f"<h2>How it was made</h2><div class='two'>{stages}{machine}</div>{note(told)}"
