"""Write the files that an export needs: the adapter, the tokenizer, prompts for the parity gate, and the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pat_serve.errors import Diverged
from pat_serve.files.atomic import new_folder, write_json, write_text
from pat_serve.run.folder import ADAPTER_FOLDER, END_TOKENS_FILE, PARITY_PROMPTS_FILE
from pat_serve.run.plan import PruningPlan, file_sha256

PARITY_ROWS = 8


def write_result(
    run: Path,
    *,
    model: Any,
    lora: dict[str, Tensor],
    tokenizer: Any,
    prompts: Sequence[list[int]],
    plan: PruningPlan,
    end_token_ids: Sequence[int] = (),
) -> None:
    """Write what an export needs; the plan comes last, so that a run with a plan is a finished run.

    Args:
        run: the run's folder.
        model: the PEFT model, for the adapter's configuration.
        lora: the adapter's tensors, whole and in main memory; empty where weights were trained in its place.
        tokenizer: tokenizer of the base.
        prompts: token ids that the parity gate compares logits on.
        plan: the plan without the adapter's hashes.
        end_token_ids: what the answers of the training end with.

    Raises:
        Diverged: a trained number is not finite; nothing is written.
    """
    folded = (tensor for fold in plan.folds.values() for tensor in vars(fold).values())
    trained = [*lora.values(), *folded, *plan.norms.values()]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
        raise _diverged(run)
    if lora:
        _write_adapter(run, model, lora)
    adapter = {path.name: file_sha256(path) for path in sorted((run / ADAPTER_FOLDER).glob("adapter_*"))}
    write_finish(
        run, tokenizer=tokenizer, prompts=prompts, end_token_ids=end_token_ids, plan=replace(plan, adapter=adapter)
    )


def write_finish(
    run: Path, *, tokenizer: Any, prompts: Sequence[list[int]], end_token_ids: Sequence[int], plan: PruningPlan
) -> None:
    """Write what an export needs beside the weights; the plan comes last.

    The arguments are those of `write_result`, with a plan that is complete.
    """
    tokenizer.save_pretrained(run)
    lines = (json.dumps({"token_ids": prompt}) + "\n" for prompt in prompts)
    write_text(run / PARITY_PROMPTS_FILE, "".join(lines))
    write_json(run / END_TOKENS_FILE, {"token_ids": list(end_token_ids)})
    plan.save(run)


def require_finite(run: Path, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Hand a trained tensor on with its name.

    Raises:
        Diverged: a number of it is not finite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise _diverged(run)
    return name, tensor


def _diverged(run: Path) -> Diverged:
    return Diverged(
        run,
        expected="finite weights after the last step",
        found="NaN or infinity",
        fix="Train again with a lower --learning-rate; metrics.jsonl shows where the loss went.",
    )


def _write_adapter(run: Path, model: Any, lora: dict[str, Tensor]) -> None:
    with new_folder(run / ADAPTER_FOLDER) as staging:
        model.save_pretrained(staging, state_dict=lora, save_embedding_layers=False)
        _sort_targets(staging / "adapter_config.json")
        # Peft leaves out what it finds no module for, such as a layer's number in the base that the cut model has not.
        named = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in lora.items()}
        save_file(named, staging / "adapter_model.safetensors", metadata={"format": "pt"})


def _sort_targets(path: Path) -> None:
    """Sort the set that peft lists in another order in every process, so that a repeated run has the same bytes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
