"""Measurements of a checkpoint in the study: quality by pat-eval's own code, size, and speed against the dense one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

CONTEXT_TOKENS = 128
# Mean distance of the gate from 0 or 1 below which it counts as decided.
POLARISED = 0.1


def quality(model: Path, data: Path) -> dict[str, float]:
    """Perplexities of held-out responses and texts, and the mean accuracy of the likelihood tasks.

    Args:
        model: a checkpoint.
        data: folder that `corpus.Corpus.save` wrote.

    Returns:
        by measure: value, and value with `_se` for its standard error where there is one.
    """
    from pat_serve.cli.eval_data import responses_of, text_of
    from pat_serve.evaluation.measuring import measure_models
    from pat_serve.evaluation.plan import Plan
    from pat_serve.training.data import load_tokenizer

    tasks = ("pat14_ll",) if any((data / "items").iterdir()) else ()
    plan = Plan(
        responses=responses_of(str(data / "heldout.jsonl"), "train", None, CONTEXT_TOKENS),
        texts=tuple(text_of(path) for path in sorted(data.glob("*.txt"))),
        context_tokens=CONTEXT_TOKENS,
        tasks=tasks,
        task_data=data / "items",
        load_tokenizer=load_tokenizer,
    )
    _, measures = measure_models([str(model)], plan)
    wanted = [measure for measure in measures if measure.metric == "ppl" or measure.of == "pat14_ll"]
    figures = {}
    for measure in wanted:
        [result] = measure.results
        figures[measure.name] = result.value
        if result.standard_error is not None:
            figures[f"{measure.name}_se"] = result.standard_error
    return figures


def speedup(dense: Path, pruned: Path, *, rounds: int = 9) -> dict[str, float]:
    """How many times as fast the pruned model reads a batch, in stock transformers on this machine.

    Both models take turns; the median of the pairs' ratios, with its bootstrap interval. On a GPU in bfloat16, and with
    a batch that keeps it busy.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pat_serve.server.analysis.statistics import paired_ratio

    on_gpu = torch.cuda.is_available()
    device, dtype, batch_size = ("cuda", torch.bfloat16, 256) if on_gpu else ("cpu", torch.float32, 8)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for path in (dense, pruned)]
    ids = torch.randint(3, int(models[0].config.vocab_size), (batch_size, CONTEXT_TOKENS), device=device)
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for number in range(rounds + 2):
            for side, model in enumerate(models):
                began = time.perf_counter()
                model(input_ids=ids)
                if on_gpu:
                    torch.cuda.synchronize()
                if number >= 2:
                    seconds[side].append(time.perf_counter() - began)
    found = paired_ratio(seconds[0], seconds[1])
    return {"speedup": found.median, "speedup_low": found.low, "speedup_high": found.high}


def course(run: Path) -> dict[str, Any]:
    """How a training went, from its metrics.jsonl; what the recipe does not have is left out.

    Returns:
        `grad_norm_max`: the largest norm of a gradient before clipping, of the logged steps.
        `gate_freeze_gap`: how far the gate was from 0 and 1, on average, when it was frozen.
        `softness_before_freeze`: the same of the last logged step before.
        `polarised_step`: the logged step from which on the gate's softness stays below 0.1, before the freeze; None
            where it does not.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    norms = [line["grad_norm"] for line in lines if line.get("grad_norm") is not None]
    figures: dict[str, Any] = {"grad_norm_max": max(norms)} if norms else {}
    gaps = [line["gate_freeze_gap"] for line in lines if line.get("gate_freeze_gap") is not None]
    if not gaps:
        return figures
    soft = [
        (line["step"], line["gate_softness"])
        for line in lines
        if "gate_softness" in line and "gate_freeze_gap" not in line
    ]
    # The gate begins open, with every channel kept: as hard as at the end. The last time that it is soft counts.
    undecided = [at for at, (_, softness) in enumerate(soft) if softness >= POLARISED]
    decided = soft[undecided[-1] + 1 :] if undecided else []
    return figures | {
        "gate_freeze_gap": gaps[-1],
        "softness_before_freeze": soft[-1][1] if soft else None,
        "polarised_step": decided[0][0] if decided else None,
    }


def nonzero_parameters(model: Path) -> int:
    """Numbers of a checkpoint that are not zero: what a model of rows that are cut could leave out."""
    from safetensors.torch import load_file

    return sum(
        int(tensor.count_nonzero()) for path in model.glob("*.safetensors") for tensor in load_file(path).values()
    )
