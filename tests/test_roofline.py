import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaForCausalLM

from pat_serve.errors import BrokenCheckpoint
from pat_serve.shapes.roofline import decode_ceiling, prefill_ceiling, prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from tests.tiny_models import tiny_config


def shipped(name: str) -> ModelSizes:
    text = (files("pat_serve.server.bench") / "shapes" / f"{name}.json").read_text()
    return ModelSizes.of(json.loads(text), source=name)


DENSE, PRUNED = shipped("llama2-7b"), shipped("llama2-7b-pat25")


def test_parameters_of_the_paper_s_shapes() -> None:
    assert DENSE.parameters == 6_738_415_616
    # All matrices and norms shrink with the hidden dimension.
    assert PRUNED.parameters * 4 == DENSE.parameters * 3


@pytest.mark.parametrize("name", ["llama2-7b-groups25", "llama2-7b-layers25", "llama2-7b-mix25"])
def test_the_other_shipped_shapes_are_a_quarter_smaller_and_load(name: str) -> None:
    assert shipped(name).parameters == pytest.approx(0.75 * DENSE.parameters, rel=0.02)
    config = json.loads((files("pat_serve.server.bench") / "shapes" / f"{name}.json").read_text())
    stock = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock)
    assert sum(parameter.numel() for parameter in model.parameters()) == shipped(name).parameters


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_transformers_count(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    shape = ModelSizes.of(config.to_dict(), source="tiny")
    assert shape.parameters == sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())


# Gemma-2B's config.json as it was published: what it leaves out is its class's default.
GEMMA_2B = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
}  # fmt: skip


@pytest.mark.parametrize("left_out", [(), ("head_dim",), ("num_key_value_heads",)])
def test_what_a_config_leaves_out_is_its_class_s_default(left_out: tuple[str, ...]) -> None:
    config = {key: value for key, value in GEMMA_2B.items() if key not in left_out}
    shape = ModelSizes.of(config, source="gemma-2b")
    with torch.device("meta"):
        model = GemmaForCausalLM(GemmaConfig(**{key: value for key, value in config.items() if key != "model_type"}))
    assert shape.tied
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    if not left_out:
        assert shape.parameters == 2_506_172_416
    assert not ModelSizes.of({**config, "tie_word_embeddings": False}, source="untied").tied


@pytest.mark.parametrize(
    ("kind", "given", "head_dim", "kv_heads"),
    [
        ("qwen3", {}, 128, 32),
        ("qwen3", {"head_dim": None, "num_key_value_heads": None}, 64, 16),
        ("mistral", {}, 64, 8),
        ("llama", {}, 64, 16),
    ],
)
def test_sizes_by_family(kind: str, given: dict[str, object], head_dim: int, kv_heads: int) -> None:
    config = {
        "model_type": kind, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2,
        "num_attention_heads": 16, "vocab_size": 100, **given,
    }  # fmt: skip
    shape = ModelSizes.of(config, source=kind)
    assert (shape.head_dim, shape.kv_heads, shape.tied) == (head_dim, kv_heads, False)


# The literature counts every parameter as read in each step, the embedding table too; then the known figures come out.
@pytest.mark.parametrize(
    ("batch_size", "context", "expected"),
    [(1, 128, 1.331), (1, 2048, 1.301), (8, 1024, 1.234), (32, 1024, 1.123), (32, 2048, 1.076)],
)
def test_known_ceilings_when_the_embedding_table_counts(batch_size: int, context: int, expected: float) -> None:
    def all_bytes(shape: ModelSizes) -> float:
        return 2 * (shape.parameters + batch_size * context * shape.kv_values_per_token)

    assert all_bytes(DENSE) / all_bytes(PRUNED) == pytest.approx(expected, abs=5e-4)
    # A step gathers only the rows of its tokens: 131 M parameters less, and a ceiling a little lower.
    ours = decode_ceiling(DENSE, PRUNED, batch_size=batch_size, context_tokens=context, dtype_bytes=2)
    assert expected - 2e-3 < ours < expected + 5e-4


def test_decode_bytes_by_hand() -> None:
    shape = ModelSizes(hidden=8, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=16, vocab=10, tied=True)
    # q 8x16, k and v 8x8, o 16x8, three FFN matrices of 8x16.
    layer = 128 + 64 + 64 + 128 + 3 * 128
    weights = 2 * layer + 5 * 8 + 10 * 8
    # A token leaves a key and a value of 2 heads x 4 in each of 2 layers.
    kv = 2 * 2 * 2 * 4
    assert shape.kv_values_per_token == kv
    step = decode_bytes(shape, batch_size=3, context_tokens=5.5, dtype_bytes=4)
    assert step == 4 * (weights + 3 * 8 + 3 * 5.5 * kv)


def test_int8_layers_are_read_in_a_byte_a_weight() -> None:
    plain = tiny_config().to_dict()
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}
    packed = {
        **plain,
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}},
    }
    dense, int8 = ModelSizes.of(plain, source="tiny"), ModelSizes.of(packed, source="tiny")
    assert (dense.linear_bytes, int8.linear_bytes) == (None, 1)
    layers = dense.layers * dense.layer_weights
    saved = [decode_bytes(shape, batch_size=2, context_tokens=8, dtype_bytes=4) for shape in (dense, int8)]
    assert saved[0] - saved[1] == 3 * layers
    assert dense.weight_bytes(4) == 4 * dense.parameters
    assert dense.weight_bytes(4) - int8.weight_bytes(4) == 3 * layers
    assert ModelSizes.of({**plain, "quantization_config": {"quant_method": "gptq"}}, source="tiny").linear_bytes is None
    int4 = ModelSizes.of({**plain, "quantization_config": {"quant_method": "gptq", "bits": 4}}, source="tiny")
    assert 2 * int4.layer_bytes(4) == int8.layer_bytes(4) == dense.layer_bytes(4) / 4


def test_prefill_flops_by_hand() -> None:
    shape = ModelSizes(hidden=8, layers=1, heads=2, kv_heads=2, head_dim=4, ffn=4, vocab=10, tied=True)
    matrices = 2 * (4 * 64 + 3 * 32) * 3
    # Three tokens make 6 causal pairs; each is 2 products of 8 numbers, 2 FLOPs a number.
    attention = 6 * 2 * 8 * 2
    assert prefill_flops(shape, batch_size=5, prompt_tokens=3) == 5 * (matrices + attention + 2 * 80)


def test_ceilings_fall_with_batch_and_context() -> None:
    decode = [
        decode_ceiling(DENSE, PRUNED, batch_size=batch, context_tokens=1024, dtype_bytes=2) for batch in (1, 8, 64)
    ]
    prefill = [prefill_ceiling(DENSE, PRUNED, batch_size=1, prompt_tokens=tokens) for tokens in (16, 512, 4096)]
    for ceilings in (decode, prefill):
        assert 4 / 3 > ceilings[0] > ceilings[1] > ceilings[2] > 1


def test_cutting_layers_keeps_the_ceiling() -> None:
    def cut(shape: ModelSizes) -> ModelSizes:
        return replace(shape, layers=2)

    for batch_size in (1, 8):
        full = decode_ceiling(DENSE, PRUNED, batch_size=batch_size, context_tokens=136, dtype_bytes=2)
        short = decode_ceiling(cut(DENSE), cut(PRUNED), batch_size=batch_size, context_tokens=136, dtype_bytes=2)
        assert short == pytest.approx(full, rel=5e-3)


@pytest.mark.parametrize("value", [None, 0, "32", True, 2.5])
def test_a_config_without_heads_is_refused(value: object) -> None:
    config = {**tiny_config().to_dict(), "num_attention_heads": value}
    with pytest.raises(BrokenCheckpoint, match="num_attention_heads"):
        ModelSizes.of(config, source="broken")
