"""pat-train: fine-tune a model and prune its hidden dimension on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pat_serve.cli.app import Debug, run_command
from pat_serve.errors import UsageError

Flag = typer.Option


def train(
    context: typer.Context,
    out: Annotated[Path | None, Flag("--out", help="Folder for the run; must not exist.")] = None,
    resume: Annotated[Path | None, Flag("--resume", help="Go on with an interrupted run's folder.")] = None,
    config: Annotated[Path | None, Flag("--config", help="A recipe in YAML; flags win over it.")] = None,
    model: Annotated[str | None, Flag(help="Base model: a folder or a hub id.")] = None,
    revision: Annotated[str | None, Flag(help="The base's revision on the hub.")] = None,
    data: Annotated[
        str | None,
        Flag(help="JSONL, JSON, CSV or Parquet file, or hub id: prompt/completion, Alpaca fields or messages."),
    ] = None,
    data_split: Annotated[str | None, Flag(help="Split of a hub dataset. [default: train]")] = None,
    streaming: Annotated[
        bool | None, Flag("--streaming", help="Read --data while training, not before; needs --max-steps.")
    ] = None,
    packing: Annotated[
        bool | None, Flag("--packing", help="Several examples a row of --max-length-tokens; none sees another.")
    ] = None,
    skip_bad_rows: Annotated[
        bool | None, Flag("--skip-bad-rows", help="Leave bad rows out and say how many, instead of stopping.")
    ] = None,
    eval_data: Annotated[str | None, Flag(help="Held-out data, a file or a hub id, for the perplexity.")] = None,
    eval_split: Annotated[str | None, Flag(help="Split of a hub --eval-data. [default: validation]")] = None,
    eval_share: Annotated[
        float | None, Flag(help="Share of --data to hold out instead; the seed decides which rows.")
    ] = None,
    eval_steps: Annotated[int | None, Flag(help="Steps between evaluations. [default: 100]")] = None,
    method: Annotated[str | None, Flag(help="pat, or lora for the dense baseline. [default: pat]")] = None,
    ratio: Annotated[
        float | None, Flag(help="Share of the hidden channels to cut, in (0, 0.6]. [default: 0.25]")
    ] = None,
    hidden_size: Annotated[int | None, Flag(help="Width to end with, instead of --ratio.")] = None,
    max_steps: Annotated[int | None, Flag(help="Optimizer steps; wins over --epochs.")] = None,
    epochs: Annotated[float | None, Flag(help="Passes over the data. [default: 3]")] = None,
    batch_size: Annotated[int | None, Flag(help="Examples a device and micro-batch. [default: 8]")] = None,
    gradient_accumulation_steps: Annotated[int | None, Flag(help="Micro-batches a step. [default: 16]")] = None,
    max_length_tokens: Annotated[int | None, Flag(help="Tokens of an example. [default: 256]")] = None,
    learning_rate: Annotated[float | None, Flag(help="Peak learning rate. [default: 5e-5]")] = None,
    mask_learning_rate: Annotated[
        float | None, Flag(help="The mask's. [default: 0.5 / milestone, the paper's way at any length]")
    ] = None,
    lr_scheduler: Annotated[str | None, Flag(help="A transformers scheduler. [default: cosine]")] = None,
    warmup_steps: Annotated[int | None, Flag(help="[default: 100, or a tenth of a short run]")] = None,
    weight_decay: Annotated[float | None, Flag(help="[default: 0]")] = None,
    max_grad_norm: Annotated[float | None, Flag(help="[default: 0.3]")] = None,
    seed: Annotated[int | None, Flag(help="[default: 0]")] = None,
    dtype: Annotated[str | None, Flag(help="auto, float32 or bfloat16, of the frozen base. [default: auto]")] = None,
    gradient_checkpointing: Annotated[
        bool | None, Flag("--gradient-checkpointing", help="Trade time for memory.")
    ] = None,
    skip_preflight: Annotated[
        bool | None, Flag("--skip-preflight", help="Begin although the memory is expected not to suffice.")
    ] = None,
    lora_rank: Annotated[int | None, Flag(help="[default: 20]")] = None,
    lora_alpha: Annotated[float | None, Flag(help="[default: 4]")] = None,
    lora_dropout: Annotated[float | None, Flag(help="[default: 0.05]")] = None,
    hio_rank: Annotated[
        int | None, Flag(help="Rank of the hybrid operators. [default: 200 of 4096, in proportion]")
    ] = None,
    milestone_share: Annotated[
        float | None, Flag(help="Share of the run after which the gate would be hard. [default: 1/3]")
    ] = None,
    report_to: Annotated[
        str | None,
        Flag(help="Of tensorboard, wandb, trackio: those to report to, with commas, or none. [default: tensorboard]"),
    ] = None,
    logging_steps: Annotated[int | None, Flag(help="[default: 10]")] = None,
    save_steps: Annotated[int | None, Flag(help="Steps between checkpoints. [default: 500]")] = None,
    keep_checkpoints: Annotated[int | None, Flag(help="Checkpoints to keep. [default: 2]")] = None,
    force: Annotated[bool, Flag("--force", help="Replace what is at --out.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a Llama-family model with LoRA while PAT prunes its hidden dimension.

    Example: `pat-train --model meta-llama/Llama-2-7b-hf --data train.jsonl --ratio 0.25 --out run/`

    then `pat-export --ckpt run/ --out pruned/`.
    """
    own = {"context", "out", "resume", "config", "force", "debug"}
    flags: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in own and value is not None
    }
    if (out is None) == (resume is None):
        raise UsageError(
            "pat-train",
            expected="--out for a new run or --resume for an old one",
            found="neither" if out is None else "both",
            fix="Give one of them.",
        )
    if resume is not None and (flags or config):
        raise UsageError(
            "--resume",
            expected="no other setting, since the run's recipe.yaml has them",
            found=", ".join(f"--{name.replace('_', '-')}" for name in [*flags, *(["config"] if config else [])]),
            fix="Leave them out, or start a new run.",
        )
    from pat_serve.progress import say
    from pat_serve.training.config import TrainRecipe
    from pat_serve.training.run import Finished, start
    from pat_serve.training.run import resume as resume_run

    finished: Finished
    if resume is not None:
        finished = resume_run(resume)
    else:
        assert out is not None
        settings = TrainRecipe.read(config) if config else {}
        # A flag also wins over the file's other way to say the same.
        for one, other in (("ratio", "hidden_size"), ("hidden_size", "ratio"), ("epochs", "max_steps")):
            if one in flags and other not in flags:
                settings.pop(other, None)
        settings |= flags
        finished = start(TrainRecipe.build(settings, "recipe"), out, force=force)
    say(
        f"{finished.run}: {finished.steps} steps, hidden_size {finished.hidden_size}. "
        f"Next: pat-export --ckpt {finished.run} --out pruned/"
    )


def main() -> None:
    """Entry point."""
    run_command(train)
