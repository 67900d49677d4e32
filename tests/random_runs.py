"""Finished runs with random content, made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.cuts import AxisCut, Cuts
from pat_serve.cut.hybrid import HybridFold
from pat_serve.files.atomic import write_text
from pat_serve.run.plan import PruningPlan, file_sha256
from pat_serve.run.replaced import write_replaced
from tests.random_cuts import random_cuts

PROMPT = torch.randint(384, (3, 40), generator=torch.Generator().manual_seed(5))


def random_run(
    folder: Path,
    base: Path,
    *,
    width: int = 48,
    counts: Mapping[str, int] | None = None,
    replaced: Sequence[str] = (),
    scale_spread: float = 0.2,
    lora: Mapping[str, Any] | None = None,
    save_embedding_layers: str | bool = "auto",
) -> Path:
    """A run with a random plan and a random adapter: nothing in it is near its starting value.

    Args:
        folder: of the run.
        base: of the model.
        width: kept channels, where the width alone is cut.
        counts: kept indices by axis, other ones in every layer; operators come with a cut of the width only.
        replaced: tensors that the run has in place of the base's.
        scale_spread: standard deviation of the operators' scales around one.
        lora: settings of the adapter that differ from the defaults'.
        save_embedding_layers: as peft's; False for an adapter on the head, as training saves it.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    checkpoint = open_checkpoint(str(base))
    D, R = checkpoint.hidden_size, 8
    model = AutoModelForCausalLM.from_pretrained(base, dtype=checkpoint.dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": checkpoint.family.lora_targets(), **(lora or {})}
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "adapter", save_embedding_layers=save_embedding_layers)
    kept = torch.randperm(D)[:width].sort().values
    folds = {
        site: HybridFold(
            l0_RD=torch.randn(R, D, dtype=checkpoint.dtype) / D**0.5,
            l1_DR=torch.randn(D, R, dtype=checkpoint.dtype) / D**0.5,
            scale_D=1 + scale_spread * torch.randn(D, dtype=checkpoint.dtype),
        )
        for site in checkpoint.family.residual_writers(checkpoint.num_layers)
    }
    cuts = Cuts({"hidden": AxisCut(width=D, kept=kept)})
    if counts is not None:
        cuts, folds = random_cuts(checkpoint.sizes, counts), folds if "hidden" in counts else {}
    stored = {**checkpoint.tensors, "lm_head.weight": checkpoint.tensors["model.embed_tokens.weight"]}
    weights = write_replaced(folder, ((name, 0.1 * torch.randn(stored[name].shape)) for name in replaced))
    write_text(folder / "recipe.yaml", "method: pat\n")
    write_text(folder / "parity_prompts.jsonl", json.dumps({"token_ids": PROMPT[0].tolist()}) + "\n")
    adapter = {path.name: file_sha256(path) for path in (folder / "adapter").glob("adapter_*")}
    PruningPlan(
        method="pat", base=checkpoint.reference(), cuts=cuts, folds=folds, adapter=adapter, weights=weights
    ).save(folder)
    return folder
