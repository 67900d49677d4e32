"""The choices of indices that stay, each against its promise."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.training.choices import CHOICE_NAMES, CHOICES, InnerChoice, Inputs, LayerChoice, choice_of
from tests.tiny_models import save_tiny_llama


def inputs(length: int = 12, block: int = 1, outputs: int = 6) -> tuple[Inputs, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(length * block, length * block, dtype=torch.float64, generator=generator)
    a_NI = torch.randn(400, length * block, dtype=torch.float64, generator=generator) @ mix
    weight = torch.randn(outputs, length * block, dtype=torch.float64, generator=generator)
    return Inputs(second_II=a_NI.T @ a_NI, weight_OI=weight, block=block), a_NI


def lost(given: Inputs, a_NI: Tensor, kept: list[int]) -> float:
    """Squared error of the outputs after least squares on the kept entries."""
    at = torch.cat([torch.arange(given.block) + i * given.block for i in kept])
    wanted = a_NI @ given.weight_OI.T
    refitted = torch.linalg.lstsq(a_NI[:, at], wanted).solution
    return float((a_NI[:, at] @ refitted - wanted).square().sum())


def test_obs_drops_what_the_others_make_up_for_best():
    given, a_NI = inputs()
    kept = inner("ffn", "obs").keep(given, 11).tolist()
    best = min(range(12), key=lambda gone: lost(given, a_NI, [i for i in range(12) if i != gone]))
    assert kept == [i for i in range(12) if i != best]


def test_energy_is_of_each_channel_alone():
    given, a_NI = inputs()
    scores = a_NI.square().sum(0) * given.weight_OI.square().sum(0)
    assert inner("ffn", "energy").keep(given, 5).tolist() == sorted(scores.topk(5).indices.tolist())


def test_leverage_drops_what_the_others_tell_of_best():
    _, a_NI = inputs()
    # The first is nearly a mix of two others, and its weight is large: another score would keep it.
    a_NI[:, 0] = a_NI[:, 3] - a_NI[:, 7]
    given = Inputs(second_II=a_NI.T @ a_NI, weight_OI=torch.eye(12, dtype=torch.float64) * 100, block=1)
    scores = (given.second_II @ given.inverse(1.0)).diagonal()
    assert inner("ffn", "leverage").keep(given, 7).tolist() == sorted(scores.topk(7).indices.tolist())
    small = a_NI / a_NI.norm(dim=0)
    given = Inputs(second_II=small.T @ small, weight_OI=given.weight_OI, block=1)
    assert 0 not in inner("ffn", "leverage").keep(given, 9).tolist()


def test_groups_are_those_that_a_refit_restores_least():
    given, a_NI = inputs(length=5, block=3)
    kept = inner("kv_groups", "refit").keep(given, 4).tolist()
    best = min(combinations(range(5), 4), key=lambda groups: lost(given, a_NI, list(groups)))
    assert kept == list(best)
    # One after the other, each judged on what is left.
    two = inner("kv_groups", "refit").keep(given, 3).tolist()
    assert set(two) < set(kept)
    nested = min(combinations(kept, 3), key=lambda groups: lost(given, a_NI, list(groups)))
    assert two == list(nested)


def test_inputs_that_are_never_there_are_no_error():
    given = Inputs(second_II=torch.zeros(6, 6, dtype=torch.float64), weight_OI=torch.ones(4, 6).double(), block=2)
    assert len(inner("kv_groups", "refit").keep(given, 2)) == 2


def test_a_layer_that_adds_nothing_goes_first(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "base", num_hidden_layers=7))
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            # The sixth is guarded, as one of the last two.
            for layer in (3, 5):
                model.get_submodule(f"model.layers.{layer}.{name}").weight.zero_()
    ids = torch.randint(3, 380, (4, 16))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert layer_choice("influence").keep(model, 7, batches, 6).tolist() == [0, 1, 2, 4, 5, 6]
    assert layer_choice("last").keep(model, 7, [], 5).tolist() == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_layers_are_as_many_as_asked(count: int):
    kept = layer_choice("last").keep(None, 5, [], count).tolist()
    assert len(kept) == count
    assert kept == sorted(kept)


def test_every_choice_has_a_name_of_its_own():
    assert len({(choice.axis, choice.name) for choice in CHOICES}) == len(CHOICES)
    assert {axis: names[0] for axis, names in CHOICE_NAMES.items()} == {
        "layers": "influence", "ffn": "obs", "kv_groups": "refit",
    }  # fmt: skip


def inner(axis: str, name: str) -> InnerChoice:
    choice = choice_of(axis, {axis: name})
    assert isinstance(choice, InnerChoice)
    return choice


def layer_choice(name: str) -> LayerChoice:
    choice = choice_of("layers", {"layers": name})
    assert isinstance(choice, LayerChoice)
    return choice
