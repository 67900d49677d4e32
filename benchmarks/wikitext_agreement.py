"""Our WikiText-2 perplexity against the one that transformers' own loss gives, on the same model.

Example: `python -m benchmarks.wikitext_agreement MODEL --text wiki.test.raw`

The second computation shares no line with the first: the text is joined and tokenized here, and every window goes alone
through the model, with the window as its labels, as in the scripts of GPTQ and SliceGPT.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")],
    text: Annotated[Path, typer.Option(help="WikiText-2's test file.")],
    context_tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
) -> None:
    """Print both figures and their relative difference; exit 1 when it is above 1e-3."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pat_serve.evaluation.measuring import measure_models
    from pat_serve.evaluation.plan import Plan, Text
    from pat_serve.evaluation.text import wikitext2_from_file
    from pat_serve.training.data import load_tokenizer

    plan = Plan(
        texts=(Text(name="wikitext2", read=lambda: wikitext2_from_file(text), identity=str(text)),),
        context_tokens=context_tokens,
        load_tokenizer=load_tokenizer,
    )
    _, [measure] = measure_models([str(model)], plan)
    ours = measure.results[0].value

    with text.open(encoding="utf-8") as lines:
        joined = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = AutoTokenizer.from_pretrained(model)(joined, return_tensors="pt", verbose=False).input_ids
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    windows = ids[0, : ids.shape[1] // context_tokens * context_tokens].view(-1, 1, context_tokens)
    with torch.no_grad():
        losses = [network(input_ids=window, labels=window).loss.item() for window in windows]
    theirs = math.exp(sum(losses) / len(losses))

    difference = abs(ours / theirs - 1)
    print(json.dumps({"ours": ours, "transformers": theirs, "windows": len(losses), "relative": difference}))
    raise typer.Exit(int(difference > 1e-3))


if __name__ == "__main__":
    typer.run(main)
