"""Every family cut along every axis: the stock class has the shapes that the table says, and computes the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.cut.config import cut_config
from pat_serve.cut.cuts import Cuts
from pat_serve.cut.slicing import targets
from pat_serve.errors import IllegalShape
from pat_serve.families.architectures import FAMILIES, LLAMA, QWEN2
from pat_serve.shapes.sizes import ModelSizes
from tests.random_cuts import random_cuts

SETTINGS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Qwen3 and Gemma have a head_dim of their own, and Qwen2 none.
HEAD_DIMS = {"llama": 16, "qwen3": 16, "gemma": 16}
SHAPES: tuple[dict[str, int], ...] = (
    {"hidden": 48},
    {"layers": 3},
    {"ffn": 40},
    {"kv_groups": 2},
    {"layers": 2, "ffn": 56},
    {"hidden": 40, "kv_groups": 2},
    {"hidden": 56, "layers": 1, "ffn": 8, "kv_groups": 1},
    {"hidden": 48, "layers": 3, "ffn": 95, "kv_groups": 2},
)


def base_config(model_type: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of a small base, parsed."""
    own = {"head_dim": HEAD_DIMS[model_type]} if model_type in HEAD_DIMS else {}
    config = AutoConfig.for_model(model_type, **(SETTINGS | own | overrides))
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found | {"architectures": [FAMILIES[model_type].architecture]}


def stock_config(config: dict[str, Any]) -> Any:
    """transformers' config object for a config.json."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of the stock class, built on the meta device."""
    return {name: tuple(value.shape) for name, value in meta_model(stock_config(config)).state_dict().items()}


@pytest.mark.parametrize("counts", SHAPES, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_stock_class_has_the_targets_shapes(model_type: str, counts: dict[str, int]):
    family = FAMILIES[model_type]
    config = base_config(model_type)
    base = ModelSizes.of(config, family)
    cuts = random_cuts(base, counts)
    names = shapes_of(config)
    found = targets(family, cuts, base, names)
    assert {name: target.base_shape for name, target in found.items() if target} == {
        name: shape for name, shape in names.items() if found[name] is not None
    }

    exported = cut_config(config, family, cuts)
    wanted = shapes_of(exported)
    other = family.class_of_export(base, cuts.sizes(base), config)
    zeros = [f"{module.format(i=i)}.bias" for module in (other.zero_biases if other else ()) for i in range(4)]
    made = {target.name: target.shape for target in found.values() if target}
    made |= {name: (exported["hidden_size"],) for name in zeros if name in wanted}
    assert made == wanted
    for target in found.values():
        if target:
            lengths = [
                whole if kept is None else len(kept) for kept, whole in zip(target.kept, target.base_shape, strict=True)
            ]
            assert tuple(lengths) == target.shape


def masked_logits(model: Any, cuts: Cuts, base: ModelSizes, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the wide model with nothing read of what is cut; by the lines alone, without the table."""
    per_group = base.heads // base.kv_heads * base.head_dim
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if f"ffn.{i}" in cuts:
                gone = sorted(set(range(base.ffn)) - set(cuts[f"ffn.{i}"].kept.tolist()))
                layer.mlp.down_proj.weight[:, gone] = 0
            if f"kv_groups.{i}" in cuts:
                for group in set(range(base.kv_heads)) - set(cuts[f"kv_groups.{i}"].kept.tolist()):
                    layer.self_attn.o_proj.weight[:, group * per_group : (group + 1) * per_group] = 0
        kept = cuts["layers"].kept.tolist() if "layers" in cuts else range(base.layers)
        model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
        model.config.num_hidden_layers = len(model.model.layers)
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    "counts",
    [{"layers": 3}, {"ffn": 40}, {"kv_groups": 2}, {"layers": 2, "ffn": 88, "kv_groups": 3}],
    ids=str,
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_sliced_weights_compute_what_is_kept(model_type: str, counts: dict[str, int]):
    """Other layers choose other channels and groups, so that a layer's cut in another one's place shows."""
    family = FAMILIES[model_type]
    # 8, 6 and 4 heads divide 96.
    config = base_config(model_type, hidden_size=96)
    base = ModelSizes.of(config, family)
    cuts = random_cuts(base, counts)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(stock_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = cut_config(config, family, cuts)
    small = AutoModelForCausalLM.from_config(stock_config(exported)).eval()
    weights = {
        target.name: target.take(stored[source])
        for source, target in targets(family, cuts, base, stored).items()
        if target
    }
    lacking = small.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys
    for name in lacking.missing_keys:
        assert name.endswith("o_proj.bias")
        small.state_dict()[name].zero_()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = small(tokens, use_cache=False).logits
    wanted = masked_logits(model, cuts, base, tokens)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.std()
    assert wanted.std() > 1e-3


def test_widening_puts_back_what_was_taken():
    config = base_config("phi3")
    base = ModelSizes.of(config, FAMILIES["phi3"])
    cuts = random_cuts(base, {"hidden": 48, "ffn": 40, "kv_groups": 2})
    for target in targets(FAMILIES["phi3"], cuts, base, shapes_of(config)).values():
        assert target is not None
        wide = torch.randn(target.base_shape)
        back = target.widen(target.take(wide))
        assert back.shape == wide.shape
        assert target.take(back).equal(target.take(wide))
        assert int((back != 0).sum()) == target.take(wide).numel()


def test_a_shape_that_llama_refuses_becomes_a_mistral():
    config = base_config("llama")
    base = ModelSizes.of(config, LLAMA)
    exported = cut_config(config, LLAMA, random_cuts(base, {"kv_groups": 3}))
    assert exported["architectures"] == ["MistralForCausalLM"]
    assert (exported["num_attention_heads"], exported["num_key_value_heads"], exported["head_dim"]) == (6, 3, 16)
    stock = stock_config(exported)
    assert stock.sliding_window is None
    assert not {"attention_bias", "mlp_bias", "pretraining_tp"} & set(exported)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_biased_llama_has_no_such_way_out(bias: str):
    config = base_config("llama", **{bias: True})
    base = ModelSizes.of(config, LLAMA)
    with pytest.raises(IllegalShape, match=r"LlamaForCausalLM wants a hidden_size that is a multiple of its 6 heads"):
        cut_config(config, LLAMA, random_cuts(base, {"kv_groups": 3}))


def test_qwen2_stays_itself_while_width_and_heads_do():
    config = base_config("qwen2")
    base = ModelSizes.of(config, QWEN2)
    assert cut_config(config, QWEN2, random_cuts(base, {"ffn": 40}))["model_type"] == "qwen2"
    assert cut_config(config, QWEN2, random_cuts(base, {"kv_groups": 2}))["model_type"] == "llama"
    with pytest.raises(IllegalShape, match="6 heads"):
        cut_config(config, QWEN2, random_cuts(base, {"kv_groups": 3}))


def test_what_a_config_says_of_each_layer_follows_the_layers():
    windows = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = base_config("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert config["layer_types"] == windows
    base = ModelSizes.of(config, FAMILIES["qwen3"])
    cuts = Cuts.of(base, {"layers": torch.tensor([1, 2, 3])})
    for stored in (config, {name: value for name, value in config.items() if name != "layer_types"}):
        exported = cut_config(stored, FAMILIES["qwen3"], cuts)
        assert stock_config(exported).layer_types == windows[1:]


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.uneven or family.export_as])
def test_what_another_class_would_fill_in_is_written(model_type: str):
    family = FAMILIES[model_type]
    for other in filter(None, (family.uneven, family.export_as)):
        own, there = CONFIG_MAPPING[model_type](), CONFIG_MAPPING[other.model_type]()
        for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "rms_norm_eps", "hidden_act"):
            if getattr(own, name) != getattr(there, name):
                assert other.filled[name] == getattr(own, name), name
