"""Fine-tune and prune with a stock Trainer. Runs in seconds, on a tiny model that it makes itself.

python examples/finetune_in_python.py out/
pat-export --ckpt out/run --out out/pruned
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pat_serve.demo.tiny.base_model import train_tokenizer
from pat_serve.training import PatCallback, PatConfig, apply_pat, save_run
from pat_serve.training.data import PadBatch, Row, encode_rows

SENTENCES = ["Join the two words.", "The words are joined.", "red green blue grey"]


def make_base(folder: Path) -> None:
    """Stands for a model from the hub: 2 layers, hidden size 64, random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES, vocab_size=384)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(out: Path) -> None:
    """Make a base, train it, save the run."""
    from transformers import AutoTokenizer

    base = out / "base"
    make_base(base)

    tokenizer = AutoTokenizer.from_pretrained(base)
    colours = ["red", "green", "blue", "grey"]
    rows = [Row(prompt=f"Join {one} and {two}: ", completion=f"{one} {two}") for one in colours for two in colours]
    examples, _ = encode_rows(rows, tokenizer, max_length_tokens=64)

    model = AutoModelForCausalLM.from_pretrained(base)
    model = apply_pat(model, PatConfig(ratio=0.25), calibration=examples[:128])
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=24,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=6,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=PadBatch(), callbacks=[PatCallback()]
    )
    trainer.train()

    run = save_run(model, out / "run")
    print(f"pat-export --ckpt {run} --out {out / 'pruned'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "finetune-out"))
