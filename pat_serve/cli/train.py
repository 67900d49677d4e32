"""pat-train: fine-tune a model and make it smaller on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pat_serve.cli.app import Debug, run_command
from pat_serve.cli.method_flags import with_method_flags
from pat_serve.errors import UsageError

Flag = typer.Option


def train(
    context: typer.Context,
    out: Annotated[Path | None, Flag("--out", help="Folder for the run; must not exist.")] = None,
    resume: Annotated[
        str | None,
        Flag("--resume", help="Go on with an interrupted run's folder; `auto`: with what is at --out, if anything is."),
    ] = None,
    config: Annotated[Path | None, Flag("--config", help="A recipe in YAML; flags win over it.")] = None,
    model: Annotated[str | None, Flag(help="Base model: a folder, a .gguf file or a hub id.")] = None,
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
        bool | None,
        Flag("--packing", help="Put several examples into a row of --max-length-tokens; none sees others."),
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
    method: Annotated[
        str | None,
        Flag(
            help="pat, cut (no narrower stream: --shape or --axes without hidden), llm-pruner, layers, atp, search, "
            "one-shot, spp (docs/methods.md), or lora for the dense baseline. [default: pat, or cut by these]"
        ),
    ] = None,
    ratio: Annotated[
        float | None, Flag(help="Share of all parameters to cut, in (0, 0.6], met within 1 %. [default: 0.25]")
    ] = None,
    axes: Annotated[
        str | None,
        Flag(
            metavar="AXIS,...",
            help="Where --ratio cuts: any of hidden, layers, ffn, kv_groups, each by about the same share of itself. "
            "[default: layers,ffn of a tied base, hidden of others and where a setting of PAT's is given]",
        ),
    ] = None,
    hidden_size: Annotated[int | None, Flag(help="Width to end with, instead of --ratio.")] = None,
    shape: Annotated[
        str | None,
        Flag(
            metavar="AXIS=COUNT,...",
            help="Counts to end with, of any of hidden, layers, ffn, kv_groups, instead of --ratio or --hidden-size.",
        ),
    ] = None,
    search_minutes: Annotated[
        float | None,
        Flag(
            help="Look for so long for the best shape at --ratio (of all parameters, then) or at --speedup: shapes are "
            "cut and measured, the best ones tuned a little. [default: 0, no search]"
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        Flag(
            help="In the place of a ratio: the smallest cut that is expected to decode so many times as fast here (one "
            "request, 128 tokens), by a short probe of the machine: of layers, or of layers and FFN channels. --axes say "
            "otherwise, and --search-minutes tries more."
        ),
    ] = None,
    choose: Annotated[
        str | None,
        Flag(
            metavar="AXIS=NAME,...",
            help="How to choose those that stay: layers=influence, last, reverse, perplexity, greedy; ffn=obs, energy, "
            "leverage; kv_groups=refit; the last two also taylor, taylor-second, taylor-mixed, taylor-vector, "
            "magnitude or random. [default: the first of each, or the method's]",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        Flag(help="Optimizer steps; they win over --epochs. 0: cut and make up for it, without any training."),
    ] = None,
    epochs: Annotated[float | None, Flag(help="Passes over the data. [default: 3]")] = None,
    batch_size: Annotated[int | None, Flag(help="Examples in a device's micro-batch. [default: 8]")] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        Flag(
            help="Micro-batches in an optimizer step. [default: 16, or fewer where the epochs have fewer than 200 such "
            "steps; 16 with --max-steps]"
        ),
    ] = None,
    max_length_tokens: Annotated[
        int | None, Flag(help="Tokens of the longest example; the rest of it is cut off. [default: 256]")
    ] = None,
    learning_rate: Annotated[
        float | None,
        Flag(
            help="Peak learning rate. [default: by the base's width: LoRA's from 1.3e-3 (576 channels) to 2.9e-4 "
            "(4096), that of weights from 2e-4 to 4.3e-5; 5e-5 with --preset paper]"
        ),
    ] = None,
    mask_learning_rate: Annotated[
        float | None,
        Flag(help="Learning rate of the mask; no scheduler changes it. [default: 0.5 / milestone, as in the paper]"),
    ] = None,
    lr_scale: Annotated[
        list[str] | None,
        Flag(
            metavar="GROUP=FACTOR",
            help="Multiply the learning rate of a group of parameters: lora_a, lora_b (LoRA+: 16), head, hsm, norms, "
            "weights. Repeatable.",
        ),
    ] = None,
    lr_scheduler: Annotated[
        str | None, Flag(help="Scheduler of transformers for the learning rate. [default: cosine]")
    ] = None,
    warmup_steps: Annotated[
        int | None,
        Flag(help="Steps in which the learning rate rises to its peak. [default: 100, or a tenth of a short run]"),
    ] = None,
    weight_decay: Annotated[
        float | None, Flag(help="AdamW's weight decay; scales and gains near one have none. [default: 0]")
    ] = None,
    max_grad_norm: Annotated[
        float | None, Flag(help="Clip the gradient to this norm. [default: 1; 0.3 with --preset paper]")
    ] = None,
    seed: Annotated[
        int | None, Flag(help="Seed of the rows' order, of held-out rows and of new weights. [default: 0]")
    ] = None,
    dtype: Annotated[
        str | None, Flag(help="Dtype of the frozen base: auto, float32 or bfloat16. [default: auto]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        Flag("--gradient-checkpointing", help="Recompute activations in the backward pass: less memory, more time."),
    ] = None,
    quantize_base: Annotated[
        str | None, Flag(help="nf4: train on a 4-bit base (QLoRA); needs bitsandbytes. [default: none]")
    ] = None,
    skip_preflight: Annotated[
        bool | None, Flag("--skip-preflight", help="Begin although memory or disk are expected not to suffice.")
    ] = None,
    train: Annotated[
        str | None,
        Flag(
            "--train",
            help="What is trained: lora (an update of each linear), head+last3 (the weights of the head and of the "
            "last three layers) or all (every weight; 16 bytes of memory for each). [default: lora]",
        ),
    ] = None,
    lora_rank: Annotated[int | None, Flag(help="Rank of LoRA's update of each linear. [default: 20]")] = None,
    lora_alpha: Annotated[
        float | None, Flag(help="LoRA's update is scaled by alpha / rank. [default: the rank; 4 with --preset paper]")
    ] = None,
    lora_dropout: Annotated[float | None, Flag(help="Dropout on the inputs of LoRA's updates. [default: 0.05]")] = None,
    lora_head: Annotated[
        bool | None,
        Flag("--lora-head/--no-lora-head", help="Adapt the output head too. [default: with --rotate, unless tied]"),
    ] = None,
    preset: Annotated[
        str | None,
        Flag(
            help="Settings to begin with: default, or paper (PAT as published, arXiv 2408.14721); --config and flags "
            "win over them. [default: default]"
        ),
    ] = None,
    recipe: Annotated[str | None, Flag("--recipe", hidden=True, help="The former name of --preset.")] = None,
    rotate: Annotated[
        str | None,
        Flag(
            help="Turn the residual stream to its principal axes first: none, energy (of its activations) or loss (and "
            "of the loss's gradient). [default: loss; energy with --max-steps 0; none with --mask-start zero or "
            "gradient]"
        ),
    ] = None,
    mask_start: Annotated[
        str | None,
        Flag(
            help="Channels to start with: zero (undecided), energy, or gradient (LLM-Pruner's score). [default: energy]"
        ),
    ] = None,
    gate: Annotated[
        str | None,
        Flag(
            help="anneal (the mask is trained), gradual (a channel after the other) or cut. [default: cut, but anneal "
            "with --mask-start zero or gradient, and on a 4-bit base]"
        ),
    ] = None,
    compensate: Annotated[
        bool | None,
        Flag(
            "--compensate/--no-compensate",
            help="Make up for the cut by least squares before the first step. [default: with --gate cut]",
        ),
    ] = None,
    refit: Annotated[
        str | None,
        Flag(help="Where that goes: full (new weights) or lora (the adapter's start, at its rank). [default: full]"),
    ] = None,
    refit_shrinkage: Annotated[
        float | None,
        Flag(
            help="How firmly the refit holds weights where they are while calibration tokens are few; 0: not at all. "
            "[default: 4]"
        ),
    ] = None,
    calibration_rows: Annotated[
        int | None,
        Flag(
            help="Training rows to measure the base on and to refit to, 8 or more. "
            "[default: 512, or those that have 131,072 tokens, and 128 at least]"
        ),
    ] = None,
    distillation_weight: Annotated[
        float | None, Flag(help="Share of the loss that is KL to the dense base, in [0, 1]; 1: KL alone. [default: 0]")
    ] = None,
    hio_rank: Annotated[
        str | None,
        Flag(
            help="Rank of the hybrid operators, or auto: 0 with --gate cut, else 200 of 4096, in proportion. "
            "[default: auto]"
        ),
    ] = None,
    tied_embeddings: Annotated[
        str | None,
        Flag(
            help="How to treat a tied base: keep (a rotation then leaves alone the channels whose last gain stands "
            "out), untie (by the rotation, or a full operator) or auto (keep; untie for a rotation beside "
            "--lora-head, --no-compensate or another gate than cut). [default: auto]"
        ),
    ] = None,
    train_norms: Annotated[
        bool | None,
        Flag("--train-norms/--no-train-norms", help="Train the gains of the stream's norms too. [default: no]"),
    ] = None,
    narrow: Annotated[
        str | None,
        Flag(
            help="off: train at the base's full width, also where the kept channels alone would do (--gate cut without "
            "operators and 4-bit base); the result is the same. [default: auto]"
        ),
    ] = None,
    milestone_share: Annotated[
        float | None, Flag(help="Share of the run after which an annealed gate would be hard. [default: 1/3]")
    ] = None,
    report_to: Annotated[
        str | None,
        Flag(help="Trackers, with commas between them: tensorboard, wandb, trackio; or none. [default: tensorboard]"),
    ] = None,
    logging_steps: Annotated[int | None, Flag(help="Steps between lines of metrics. [default: 10]")] = None,
    save_steps: Annotated[int | None, Flag(help="Steps between checkpoints. [default: 500]")] = None,
    keep_checkpoints: Annotated[int | None, Flag(help="How many checkpoints to keep, the newest. [default: 2]")] = None,
    force: Annotated[bool, Flag("--force", help="Replace what is at --out.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a Llama-family model with LoRA while PAT cuts its hidden dimension, or the axes of `--shape`.

    Example: `pat-train --model meta-llama/Llama-2-7b-hf --data train.jsonl --ratio 0.25 --out run/`

    then `pat-export --ckpt run/ --out pruned/`.
    """
    own = {"context", "out", "resume", "config", "preset", "recipe", "force", "debug"}
    flags: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in own and value not in (None, [], ())
    }
    auto = resume == "auto"
    if auto and (out is None or force):
        raise UsageError(
            "--resume auto",
            expected="--out, the run to start or to go on with, without --force",
            found="no --out" if out is None else "--force, which starts anew",
            fix="Give --out alone; a folder that is called auto is ./auto.",
        )
    if not auto and (out is None) == (resume is None):
        raise UsageError(
            "pat-train",
            expected="--out for a new run or --resume for an old one",
            found="neither" if out is None else "both",
            fix="Give one of them.",
        )
    others_given = {"config": config, "preset": preset, "recipe": recipe}
    unheard = [*flags, *(name for name, value in others_given.items() if value is not None)]
    if resume is not None and not auto and (unheard or force):
        raise UsageError(
            "--resume",
            expected="no other setting, since the run's recipe.yaml has them",
            found=", ".join(f"--{name.replace('_', '-')}" for name in [*unheard, *(["force"] if force else [])]),
            fix="Leave them out, or start a new run.",
        )
    from pat_serve.terminal.progress import say
    from pat_serve.training.config import TrainRecipe
    from pat_serve.training.presets import preset_settings
    from pat_serve.training.recipe_file import overridden, read_recipe
    from pat_serve.training.run import Finished, start, start_or_resume
    from pat_serve.training.run import resume as resume_run

    finished: Finished | None
    if resume is not None and not auto:
        finished = resume_run(Path(resume))
    else:
        assert out is not None
        settings = preset_settings(preset, recipe) | (read_recipe(config) if config else {})
        checked = TrainRecipe.build(overridden(settings, flags, TrainRecipe.model_fields), "recipe")
        finished = start_or_resume(checked, out) if auto else start(checked, out, force=force)
    if finished is None:
        say(f"{out}: finished already. Next: pat-export --ckpt {out} --out pruned/")
        return
    say(
        f"{finished.run}: {finished.steps} steps, {', '.join(f'{axis} {n}' for axis, n in finished.shape.items())}. "
        f"Next: pat-export --ckpt {finished.run} --out pruned/"
    )


def main() -> None:
    """Run the command line of `pat-train`, to the end of the process."""
    run_command(with_method_flags(train, sys.argv[1:]))
