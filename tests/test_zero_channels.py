"""Everything rests on this: with a hard gate, the same channels are zero everywhere in the residual stream."""

from __future__ import annotations

from pathlib import Path

import torch

from pat_serve.families.architectures import LLAMA
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.methods.pat.method import Pat
from tests.conftest import tiny_recipe
from tests.tiny_models import tiny_llama


def test_pruned_channels_are_zero_through_every_norm_and_layer(tmp_path: Path):
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    sizes = ModelSizes.of(model.config.to_dict(), LLAMA)
    method = Pat(tiny_recipe(tmp_path, tmp_path), LLAMA, sizes, sizes.with_counts({"hidden": 48}), 24)
    torch.manual_seed(1)
    method.attach(model, num_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hsm" in name or "pat_mask" in name:
                parameter.normal_()
    method.on_step(method.mask.schedule.freeze_step)
    pruned = torch.ones(64, dtype=torch.bool)
    pruned[method.cuts()["hidden"].kept] = False
    assert pruned.sum() == 16

    seen = 0

    def check(_module: object, _inputs: object, output: object) -> None:
        nonlocal seen
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        assert (hidden[..., pruned] == 0).all()
        assert (hidden[..., ~pruned] != 0).any()
        seen += 1

    for name, module in model.named_modules():
        if name.endswith(("norm", "layernorm")) or name.removeprefix("model.layers.").isdigit():
            module.register_forward_hook(check)
    model(input_ids=torch.randint(384, (2, 9)))
    assert seen == 2 * 3 + 1  # two norms and the layer itself, twice; the final norm


def test_hsms_sit_on_every_residual_writer():
    assert LLAMA.residual_writers(2) == [
        "model.embed_tokens",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
