"""Write what an export needs of a trained model: adapter, tokenizer, parity prompts and, last, the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pat_serve.atomic import new_folder, write_text
from pat_serve.errors import Diverged
from pat_serve.plan import BaseReference, PruningPlan, file_sha256
from pat_serve.run_folder import ADAPTER_FOLDER, PARITY_PROMPTS_FILE
from pat_serve.training.methods import Method


def write_result(
    run: Path, model: nn.Module, method: Method, base: BaseReference, tokenizer: Any, prompts: Sequence[list[int]]
) -> None:
    """The plan comes last, so that a run with a plan is a finished run.

    Args:
        run: an existing folder.
        model: the PEFT model.
        method: with a frozen mask.
        base: what the model was trained from.
        tokenizer: the base's.
        prompts: token ids that the export's parity gate feeds both models.

    Raises:
        Diverged: a trained weight is not finite.
    """
    # Left to itself, peft also writes the HSMs that sit under the adapted modules.
    lora = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    folds = method.folds()
    trained = [*lora.values(), *(tensor for fold in folds.values() for tensor in vars(fold).values())]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
        raise Diverged(
            run,
            expected="finite weights after the last step",
            found="NaN or infinity",
            fix="Train again with a lower --learning-rate; metrics.jsonl shows where the loss went.",
        )
    with new_folder(run / ADAPTER_FOLDER) as staging:
        model.save_pretrained(staging, state_dict=lora, save_embedding_layers=False)  # type: ignore[operator]  # PEFT's
    tokenizer.save_pretrained(run)
    lines = [json.dumps({"token_ids": token_ids}) + "\n" for token_ids in prompts]
    write_text(run / PARITY_PROMPTS_FILE, "".join(lines))
    PruningPlan(
        method=method.name,
        base=base,
        axes=method.axes(),
        folds=folds,
        adapter={path.name: file_sha256(path) for path in sorted((run / ADAPTER_FOLDER).glob("adapter_*"))},
    ).save(run)
