"""Train a small Llama from nothing on given texts, so that a base model exists without any download."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pat_serve.demo.corpus import first_texts
from pat_serve.files.atomic import new_folder
from pat_serve.terminal.progress import console, progress_bar

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A tokenizer learns from so much text. More would only take longer.
TOKENIZER_CHARACTERS = 12_000_000


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Shape and budget of the demo's base: what two cores train in about two minutes."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    context_tokens: int = 128
    batch_size: int = 8
    steps: int = 350
    learning_rate: float = 3e-3
    # transformers' 0.02 is made for thousands of channels; here it costs a quarter of a nat after 200 steps (LOG.md).
    initializer_range: float = 0.05
    tied: bool = False
    model_type: str = "llama"
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes every string and has no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_texts(texts, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, context_tokens: int) -> list[dict[str, Tensor]]:
    """Concatenate <s> text </s> ... and cut into blocks of equal length; the rest is dropped.

    Returns:
        `input_ids` and `labels` of each block: int64 (context_tokens,).
    """
    ids = array("i")
    for text in tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
        ids.append(tokenizer.bos_token_id)
        ids.extend(text)
        ids.append(tokenizer.eos_token_id)
    stream = torch.tensor(ids, dtype=torch.int64)
    blocks = stream[: len(stream) // context_tokens * context_tokens].view(-1, context_tokens)
    return [{"input_ids": block, "labels": block} for block in blocks]


def train_base(texts: list[str], folder: Path, settings: BaseSettings) -> None:
    """Train tokenizer and model and save both, atomically; on a GPU in mixed precision, if there is one."""
    set_seed(settings.seed)
    on_gpu = torch.cuda.is_available()
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    # A server puts the tokenizer's own tokens before a prompt, so `pack` trains the base with the same tokens.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    # The default heads of Qwen3 and Gemma are as wide as those of their large models.
    own = {"head_dim": settings.hidden_size // settings.heads} if settings.model_type in ("qwen3", "gemma") else {}
    config = AutoConfig.for_model(
        settings.model_type,
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=512,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=settings.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    with new_folder(folder) as staging:
        arguments = TrainingArguments(
            output_dir=str(staging),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.steps // 20,
            weight_decay=0.1,
            max_grad_norm=1.0,
            seed=settings.seed,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            use_cpu=not on_gpu,
            bf16=on_gpu,
        )
        with progress_bar() as progress:
            task = progress.add_task("train the base model", total=settings.steps)
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=pack(texts, tokenizer, settings.context_tokens),
                data_collator=default_data_collator,
                callbacks=[_Bar(progress, task)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            trainer.train()
        model.to(torch.float32).save_pretrained(staging)
        tokenizer.save_pretrained(staging)


class _Bar(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, description=f"train the base model: loss {logs['loss']:.3f}")
            if not console.is_terminal and state.global_step % 50 == 0:
                console.print(
                    f"  step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}", highlight=False
                )
