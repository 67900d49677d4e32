"""Write report.html of the demo on the real model, one self-contained page. Every figure comes from report.json."""

from __future__ import annotations

from html import escape
from typing import Any

from pat_serve.demo.charts import losses_chart, speedup_chart
from pat_serve.demo.real.budget import PROBE_TOKENS
from pat_serve.demo.real.findings import told_cut
from pat_serve.demo.report_parts import Html, cards, colored, figure, measured_ratio, note, page, plain, table

_NAMES = ("parent", "pruned")
_MORE = (
    (
        "Train longer",
        "<code>pat-train</code> with the recipe of <code>demo-out/run/recipe.yaml</code> and more steps, on more and "
        "better text than a model's own short answers. The figures above are those of the first minutes.",
    ),
    ("Your own data", "<code>--data</code> takes prompts and completions, Alpaca fields and chats: README.md."),
    (
        "Another size",
        "<code>--shape layers=27,ffn=1408</code> cuts less and loses less. <code>pat-shapes</code> lists what each "
        "shape saves, before a weight is read.",
    ),
    (
        "A larger model",
        "A model of 135 million parameters has little to spare, and a fifth of it is its vocabulary. What larger ones "
        "gain and lose is in docs/numbers.md and docs/ablation.md.",
    ),
)


def render(findings: dict[str, Any]) -> str:
    """Render the page from the findings."""
    sections = [_head(findings), _cards(findings), _talk(findings), _facts(findings), _quality(findings),
                _speed(findings), _training(findings), _more(), _method(findings)]  # fmt: skip
    return page("pat-serve demo report", sections)


def _head(findings: dict[str, Any]) -> str:
    models, plan, machine = findings["models"], findings["plan"], findings["machine"]
    return (
        "<h1>A chat model, a quarter smaller after ten minutes</h1>"
        f"<p class='lead'>SmolLM2-135M-Instruct, {told_cut(models['parent']['shape'], models['pruned']['shape'])}, "
        f"trained for {plan['steps']} steps of {plan['rows_per_step']} "
        f"conversations, of {plan['rows']} in which it answers itself. {escape(findings['date'])}, "
        f"{escape(str(machine['cpu_model']))}, {machine['cpu_cores']} cores.</p>"
        "<p>That is a taste and no finished model: so few steps bring back a part of what the cut took. Read what both "
        "say, and judge.</p>"
    )


def _cards(findings: dict[str, Any]) -> str:
    models, facts = findings["models"], findings["facts"]
    sizes = [models[name]["parameters"] for name in _NAMES]
    items = [
        (f"{facts['pruned']} of {facts['asked']}", f"easy questions right; its parent: {facts['parent']}"),
        (f"{sizes[1] / sizes[0] - 1:+.1%}", f"parameters: {sizes[0]:,} to {sizes[1]:,}"),
    ]
    for regime in findings["speedup"]["regimes"]:
        items.append((f"{regime['ratio']['median']:.2f}x", f"{regime['regime']}, measured against the parent"))
    return cards(items)


def _talk(findings: dict[str, Any]) -> str:
    rows = []
    for conversation in findings["talk"]:
        for turn, question in enumerate(conversation["questions"]):
            answers = [conversation["answers"][name][turn] for name in _NAMES]
            again = "<br><small>(goes on from the answer above)</small>" if turn else ""
            rows.append([Html(escape(question) + again), *(Html(_said(answer)) for answer in answers)])
    told = (
        "Greedy, through each model's chat template, from one server: POST /generate and POST /baseline/generate with "
        "messages. None of these questions was trained on."
    )
    return f"<h2>Ask both</h2>{table(['question', 'parent', 'pruned'], rows)}{note(told)}"


def _said(answer: dict[str, Any]) -> str:
    cut = " …" if answer["finish_reason"] == "length" else ""
    return f"<div class='said'>{escape(answer['text'].strip())}{cut}</div>"


def _facts(findings: dict[str, Any]) -> str:
    rows = [
        [fact["question"], *(Html(_fact(fact["answers"][name])) for name in _NAMES)]
        for fact in findings["fact_answers"]
    ]
    told = (
        f"An answer is right when the expected word is in it. {findings['facts']['asked']} questions say which model "
        "is the better one when they differ by many, and nothing when they differ by two."
    )
    return f"<h2>Easy questions</h2>{table(['question', 'parent', 'pruned'], rows)}{note(told)}"


def _fact(answer: dict[str, Any]) -> str:
    word = "pass" if answer["right"] else "fail"
    mark = "✓" if answer["right"] else "✗"
    return f"<span class='{word}'>{mark}</span> {escape(answer['text'].strip())}"


def _quality(findings: dict[str, Any]) -> str:
    rows = [
        [what, *(f"{results[name]['perplexity']:.2f}" for name in _NAMES),
         f"{results['pruned']['perplexity'] / results['parent']['perplexity'] - 1:+.0%}", results["parent"]["tokens"]]
        for what, results in findings["quality"].items()
    ]  # fmt: skip
    told = (
        "pat-eval, stock transformers. The held-out rows are the parent's own answers to prompts that were not trained "
        "on, so the parent has an advantage there; the text is Python's language reference, which was not trained on "
        "here."
    )
    headers = ["text", "#perplexity, parent", "#pruned", "#change", "#tokens"]
    return f"<h2>What was lost</h2>{table(headers, rows)}{note(told)}"


def _speed(findings: dict[str, Any]) -> str:
    speedup = findings["speedup"]
    rows = [[regime["regime"], *measured_ratio(regime)] for regime in speedup["regimes"]]
    headers = ["regime", "#parent ms", "#pruned ms", "#ratio, 95 % interval", "#ceiling", "verdict", "why"]
    told = (
        f"POST /benchmark/speedup of the server that answered above: {speedup['rounds']} paired rounds, batch 1, 128 "
        f"prompt tokens, {speedup['dtype']}. The ceiling counts bytes and operations alone. A model this small spends "
        "much of its time on other work in each of its layers, so that a dropped layer saves more than a narrower "
        "one. What larger models gain is in docs/numbers.md."
    )
    return (
        f"<h2>Speed: at least {speedup['settings']['claim']}x? {colored(speedup['verdict'])}</h2>"
        f"<p>{escape(speedup['reason'])}</p>{table(headers, rows)}{figure(speedup_chart(speedup), first_on_page=True)}"
        f"{note(told)}"
    )


def _training(findings: dict[str, Any]) -> str:
    parity = findings["parity"]
    told = (
        "The layers that change the residual stream least are dropped, and from each other layer those FFN channels "
        "that the rest makes up for best. Least squares gives new weights to the outputs of attentions and MLPs. LoRA "
        "then trains the smaller model. The exported files compute what was trained: largest logit "
        f"difference {parity['max_abs_over_std']:.1e} of their standard deviation over {parity['positions']} positions."
    )
    return f"<h2>Training</h2>{figure(losses_chart(findings['training']))}{note(told)}"


def _more() -> str:
    items = "".join(f"<li><b>{title}.</b> {text}</li>" for title, text in _MORE)
    return f"<h2>What to do for more</h2><ul>{items}</ul>"


def _method(findings: dict[str, Any]) -> str:
    stages = table(["stage", "#seconds"], [[name, f"{seconds:.0f}"] for name, seconds in findings["stage_s"].items()])
    machine = table(["machine", ""], [[key, plain(value)] for key, value in findings["machine"].items()])
    plan = findings["plan"]
    told = (
        f"A forward and a backward pass over {PROBE_TOKENS:,} tokens took {plan['probe_s']:.1f} s here; the "
        "number of steps is what fits into ten minutes after that. All figures: report.json. The demo printed its "
        "commands, and run/recipe.yaml repeats the training."
    )
    return f"<h2>How it was made</h2><div class='two'>{stages}{machine}</div>{note(told)}"
