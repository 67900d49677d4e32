"""report.html: what the demo found, on one self-contained page. Every figure comes from report.json."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go

from pat_serve.demo.charts import axes_chart, loss_chart, quality_chart, speedup_chart

_STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1040px; margin: 2.5rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, .note { color: var(--soft); } .note { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.card b { display: block; font-size: 1.45rem; } .card > span { color: var(--soft); font-size: .88rem; }
.pass { color: #15803d; } .fail { color: #b91c1c; } .inconclusive { color: #a16207; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f7f9; border-radius: 8px; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; margin: 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 900px) { .two { grid-template-columns: 1fr; } }
.two > * { min-width: 0; }
"""


def render(findings: dict[str, Any]) -> str:
    """The page."""
    sections = [_head(findings), _cards(findings), _quality(findings), _training(findings), _speedup(findings),
                _answers(findings), _latency(findings), _method(findings)]  # fmt: skip
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>pat-serve demo report</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


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
    cards = (
        (f"claim {speedup['settings']['claim']}x: {_colored(speedup['verdict'])}", "speed-up on the cut 7B shapes"),
        (
            f"{parity['max_abs_over_std']:.1e}",
            "largest logit difference between the trained and the exported model, of the logits' standard deviation",
        ),
        (f"{share:.1%}", f"of the dense parameters: {models['pruned']['parameters']:,}"),
        (f"{gap:+.1%}", "held-out perplexity, pruned against dense LoRA at the same budget"),
    )
    html = "".join(f"<div class='card'><b>{value}</b><span>{title}</span></div>" for value, title in cards)
    return f"<div class='cards'>{html}</div>"


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
    note = (
        f"First docstring sentences of modules that no training saw: {first['examples']} rows, {first['tokens']} "
        "response tokens, through the exported checkpoints in stock transformers."
    )
    table = _table(["model", "#hidden size", "#parameters", "#perplexity", "#nats per token ± s.e."], rows)
    chart = _figure(quality_chart(findings["quality"]), first_on_page=True)
    return f"<h2>Quality</h2>{table}{_note(note)}{chart}"


def _training(findings: dict[str, Any]) -> str:
    training, kept = findings["training"], findings["models"]["pruned"]["hidden_size"]
    cut = sum(findings["axes"][kept:])
    note = (
        "Equal steps, tokens and LoRA for both. PAT first turns the residual stream to the axes of its energy and of "
        f"the loss's gradient; the weakest, with {cut:.1%} of both, are cut before the first step, and LoRA starts "
        "where it makes up for them."
    )
    axes = axes_chart(findings["axes"], kept)
    charts = f"<div>{_figure(loss_chart(training))}</div><div>{_figure(axes)}</div>"
    return f"<h2>Training</h2><div class='two'>{charts}</div>{_note(note)}"


def _speedup(findings: dict[str, Any]) -> str:
    speedup = findings["speedup"]
    settings = speedup["settings"]
    rows = [
        [
            regime["regime"],
            f"{regime['batch_size']} x {regime['context_tokens']:g}",
            _ms(regime["baseline"]["median"]),
            _ms(regime["candidate"]["median"]),
            f"{regime['ratio']['median']:.3f}x [{regime['ratio']['low']:.3f}, {regime['ratio']['high']:.3f}]",
            f"{regime['ceiling']:.3f}x",
            _Html(_colored(regime["verdict"])),
            regime["reason"],
        ]
        for regime in speedup["regimes"]
    ]
    headers = ["regime", "#batch x context", "#dense ms", "#pruned ms", "#ratio, 95 % interval", "#ceiling", "verdict"]
    note = (
        f"{speedup['baseline']['name']} against {speedup['candidate']['name']}, {settings['layers']} layers, random "
        f"weights, {speedup['dtype']}, {speedup['rounds']} interleaved pairs, one vLLM process each, the same token "
        "ids. The KV cache does not shrink, so the ceiling falls with batch and context."
    )
    return (
        f"<h2>Speed-up: {_colored(speedup['verdict'])}</h2><p>{escape(speedup['reason'])}</p>"
        f"{_table([*headers, 'why'], rows)}{_figure(speedup_chart(speedup))}{_note(note)}"
    )


def _answers(findings: dict[str, Any]) -> str:
    rows = [
        [
            _Html(f"<pre>{escape(question['prompt'].splitlines()[1])}</pre>"),
            question["reference"],
            question["answers"]["dense"]["text"].strip(),
            question["answers"]["pruned"]["text"].strip(),
        ]
        for question in findings["serving"]["questions"]
    ]
    note = (
        "Greedy, from held-out modules, through POST /generate. A base of this size, trained for minutes, knows the "
        "form of a docstring and little of the world: compare the two columns, not either with the truth."
    )
    table = _table(["signature", "its docstring", "dense", "pruned"], rows)
    return f"<h2>The same questions over HTTP</h2>{table}{_note(note)}"


def _latency(findings: dict[str, Any]) -> str:
    rows = [
        [
            name,
            _ms(figures["summary"]["ttft_s"]["median"]),
            _ms(figures["summary"]["tpot_s"]["median"]),
            f"{figures['summary']['output_tokens_per_s']['median']:.0f}",
        ]
        for name, figures in findings["serving"]["latency"].items()
    ]
    note = (
        "Medians from POST /benchmark/latency, one request at a time, 128 prompt and 32 output tokens, both servers up "
        "on the same cores. Models this small spend their time outside matrix products: the speed-up is judged above."
    )
    table = _table(["model", "#TTFT ms", "#TPOT ms", "#output tokens/s"], rows)
    return f"<h2>Latency of the small models</h2>{table}{_note(note)}"


def _method(findings: dict[str, Any]) -> str:
    stages = _table(["stage", "#seconds"], [[name, f"{seconds:.0f}"] for name, seconds in findings["stage_s"].items()])
    machine = _table(["machine", ""], [[key, _plain(value)] for key, value in findings["machine"].items()])
    note = (
        "All figures: report.json. Raw timestamps: speedup.json. The demo printed its commands, and runs/*/recipe.yaml "
        "repeats a training."
    )
    return f"<h2>How it was made</h2><div class='two'>{stages}{machine}</div>{_note(note)}"


class _Html(str):
    """A cell that is markup already."""


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    """A table; a header that begins with # is of numbers, aligned to the right."""
    numeric = [header.startswith("#") for header in headers]

    def line(tag: str, cells: list[Any]) -> str:
        tagged = [
            f"<{tag}{' class=n' if right else ''}>{cell if isinstance(cell, _Html) else escape(str(cell))}</{tag}>"
            for right, cell in zip(numeric, cells, strict=True)
        ]
        return f"<tr>{''.join(tagged)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table>{line('th', [header.lstrip('#') for header in headers])}{body}</table>"


def _colored(verdict: str) -> str:
    return f"<span class='{escape(verdict)}'>{escape(verdict)}</span>"


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _figure(figure: go.Figure, *, first_on_page: bool = False) -> str:
    """A chart; the first brings plotly's script along, so that the page needs no network."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=first_on_page, config={"displayModeBar": False, "responsive": True}
    )
    return html
