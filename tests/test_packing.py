"""A packed row computes what its examples compute alone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.training.data import PadBatch, pack_examples
from pat_serve.training.data.packing import join, pack_stream
from pat_serve.training.model.insert import adapt
from tests.tiny_models import tiny_llama

LENGTH = 32


def random_examples(number: int, longest: int = LENGTH, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    examples = []
    for _ in range(number):
        ids = [rng.randrange(3, 384) for _ in range(rng.randint(2, longest))]
        prompt = rng.randint(1, len(ids) - 1)
        labels = [IGNORED_LABEL] * prompt + ids[prompt:]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return examples


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_compute_what_the_examples_compute_alone(attention: str):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    examples = random_examples(9, longest=14)
    packed = pack_examples(examples, LENGTH)
    assert 1 < len(packed) < len(examples)
    batch = PadBatch()(packed)
    with torch.no_grad():
        together = model(**batch)
        alone = model(**PadBatch()(examples))
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-6)

    by_ids = {tuple(example["input_ids"]): row for row, example in enumerate(examples)}
    compared = 0
    for row, example in enumerate(packed):
        borders = [at for at, position in enumerate(example["position_ids"]) if position == 0]
        for start, end in zip(borders, [*borders[1:], len(example["input_ids"])], strict=True):
            reference = alone.logits[by_ids[tuple(example["input_ids"][start:end])], : end - start]
            torch.testing.assert_close(together.logits[row, start:end], reference, rtol=1e-5, atol=2e-5)
            compared += 1
    assert compared == len(examples)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_changed_sample_leaves_its_neighbours_alone(checkpointing: bool, tiny_base, rows):
    """Through everything that a run trains with: LoRA, HSMs, and recomputation."""
    from pat_serve.checkpoints.checkpoint import open_checkpoint
    from tests.conftest import tiny_recipe

    recipe = tiny_recipe(tiny_base, rows, lora_dropout=0.0, gradient_checkpointing=checkpointing)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model, _ = adapt(base, open_checkpoint(str(tiny_base)).family, recipe, {"hidden": 48}, 24)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    first, second, other = random_examples(3, seed=3)
    other |= {"input_ids": (other["input_ids"] * LENGTH)[: len(first["input_ids"])], "labels": first["labels"]}
    tail = slice(len(first["input_ids"]), None)
    one, two = (model(**PadBatch()([join([head, second])])).logits[0, tail] for head in (first, other))
    assert first["input_ids"] != other["input_ids"]
    assert torch.equal(one, two)


def test_packing_loses_nothing_and_wastes_little():
    examples = random_examples(200)
    rows = pack_examples(examples, LENGTH)
    assert all(len(row["input_ids"]) <= LENGTH for row in rows)
    tokens = sum(len(example["input_ids"]) for example in examples)
    assert sum(len(row["input_ids"]) for row in rows) == tokens
    assert tokens / (len(rows) * LENGTH) > 0.95
    assert rows == pack_examples(examples, LENGTH)
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(
        token for example in examples for token in example["input_ids"]
    )


def test_a_stream_is_packed_in_its_order():
    examples = random_examples(20)
    rows = list(pack_stream(iter(examples), LENGTH))
    assert [token for row in rows for token in row["input_ids"]] == [
        token for example in examples for token in example["input_ids"]
    ]
    assert all(len(row["input_ids"]) <= LENGTH for row in rows)
    assert len(rows) < len(examples)


def test_the_first_label_of_a_sample_does_not_count():
    row = join([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    assert row["labels"] == [IGNORED_LABEL, 6, IGNORED_LABEL, 8]
