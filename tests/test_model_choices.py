"""Choices that look at the whole model: Taylor scores, sizes of weights, and layers by the loss without them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices import ModelChoice, choice_of
from pat_serve.training.choices import taylor as taylor_file
from pat_serve.training.choices.base import LayerChoice
from pat_serve.training.choices.perplexity import loss_without
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.llm_pruner import LlmPruner
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

AXES = ("ffn", "kv_groups")


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 380, (2, 3, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[:, 1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0, :6] = -100
    return [
        {"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(ids, mask, labels, strict=True)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "phi3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    return save_tiny_family(folder, request.param, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


def gradients(model: Any, groups: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Gradients of the model's own mean loss over each group of rows, by autograd on all weights at once."""
    found = []
    for batch in groups:
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def by_hand(name: str, model: Any, sizes: ModelSizes) -> dict[str, Tensor]:
    """The score of every index, from whole gradients, with the slices of a group written out."""
    rows = [{n: t[i : i + 1] for n, t in batch.items()} for batch in batches() for i in range(3)]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    if name in ("taylor", "taylor-vector"):
        counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
        each = gradients(model, rows)
        g = {n: sum(c * one[n] for c, one in zip(counts, each, strict=True)) / sum(counts) for n in each[0]}
        terms = {n: weights[n] * g[n] for n in g}
    else:
        each = gradients(model, rows)
        g = {n: sum(one[n] for one in each) / len(rows) for n in each[0]}
        second = {n: sum(one[n].square() for one in each) / len(rows) for n in g}
        terms = {n: weights[n].square() * second[n] for n in g}
        if name == "taylor-mixed":
            terms = {n: weights[n] * g[n] - terms[n] / 2 for n in g}

    def size(part: Tensor, dimension: int) -> Tensor:
        return part.sum(1 - dimension).abs().sum() if name == "taylor-vector" else part.abs().sum()

    d, per = sizes.head_dim, sizes.heads_per_group
    q_rows, kv_rows = sizes.heads * d, sizes.kv_heads * d
    scores = {"ffn": torch.zeros(sizes.layers, sizes.ffn), "kv_groups": torch.zeros(sizes.layers, sizes.kv_heads)}
    for i in range(sizes.layers):
        part = {n.removeprefix(f"model.layers.{i}."): t for n, t in terms.items() if f"layers.{i}." in n}
        if "self_attn.qkv_proj.weight" in part:
            q, k, v = part["self_attn.qkv_proj.weight"].split([q_rows, kv_rows, kv_rows])
            gate, up = part["mlp.gate_up_proj.weight"].chunk(2)
        else:
            q, k, v = (part[f"self_attn.{n}_proj.weight"] for n in "qkv")
            gate, up = part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]
        for j in range(sizes.ffn):
            down = part["mlp.down_proj.weight"][:, j : j + 1]
            scores["ffn"][i, j] = size(gate[j : j + 1], 0) + size(up[j : j + 1], 0) + size(down, 1)
        for j in range(sizes.kv_heads):
            heads, own = slice(j * per * d, (j + 1) * per * d), slice(j * d, (j + 1) * d)
            o = part["self_attn.o_proj.weight"][:, heads]
            scores["kv_groups"][i, j] = size(q[heads], 0) + size(k[own], 0) + size(v[own], 0) + size(o, 1)
    return scores


@pytest.mark.parametrize("held", [10**9, 1], ids=["one pass", "a pass a layer"])
@pytest.mark.parametrize("name", ["taylor", "taylor-second", "taylor-mixed", "taylor-vector"])
def test_scores_are_those_of_whole_gradients(name: str, held: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taylor_file, "HELD_BYTES", held)
    checkpoint = open_checkpoint(str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = model_choice(name).importance(model, checkpoint.family, checkpoint.sizes, batches(), AXES)
    wanted = by_hand(name, model.requires_grad_(True), checkpoint.sizes)
    for axis in AXES:
        assert torch.allclose(found[axis].float(), wanted[axis], rtol=2e-4), axis


def test_magnitude_is_the_sum_of_squares(base: Path) -> None:
    checkpoint = open_checkpoint(str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[:, 7] = 0
        before = model_choice("magnitude").importance(model, checkpoint.family, checkpoint.sizes, [], ["ffn"])["ffn"]
        model.get_submodule("model.layers.1.mlp.down_proj").weight[:, 7] = 2
    after = model_choice("magnitude").importance(model, checkpoint.family, checkpoint.sizes, [], ["ffn"])["ffn"]
    gained = after - before
    assert float(gained[1, 7]) == pytest.approx(4 * 64)
    assert int(gained.count_nonzero()) == 1


def test_layers_by_the_loss_without_them(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    shorter = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    shorter.model.layers = torch.nn.ModuleList([shorter.model.layers[i] for i in (0, 2)])
    shorter.config.num_hidden_layers = 2
    with torch.no_grad():
        wanted = sum(float(shorter(**b, use_cache=False).loss) * int((b["labels"][:, 1:] != -100).sum())
                     for b in batches())  # fmt: skip
    assert loss_without(model, batches(), [1]) == pytest.approx(wanted, rel=1e-5)


def test_greedy_drops_one_after_the_other(tmp_path: Path) -> None:
    folder = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=7)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = {count: set(layer_choice("greedy").keep(model, 7, batches(), count).tolist()) for count in (7, 6, 5, 4)}
    assert [len(kept[count]) for count in (7, 6, 5, 4)] == [7, 6, 5, 4]
    gone: list[int] = []
    for more, fewer in pairwise([kept[count] for count in (7, 6, 5, 4)]):
        [dropped] = more - fewer
        losses = {layer: loss_without(model, batches(), [*gone, layer]) for layer in (2, 3, 4) if layer not in gone}
        assert dropped == min(losses, key=lambda layer: losses[layer])
        gone.append(dropped)
    assert {0, 1, 5, 6} <= kept[4]
    # One shot: each is judged in the whole model.
    one_shot = {layer: loss_without(model, batches(), [layer]) for layer in (2, 3, 4)}
    best = max(one_shot, key=lambda layer: one_shot[layer])
    assert layer_choice("perplexity").keep(model, 7, batches(), 5).tolist() == sorted({0, 1, 5, 6, best})
    assert layer_choice("reverse").keep(model, 7, batches(), 5).tolist() == [0, 1, 2, 3, 4]


def test_llm_pruner_from_data_to_a_stock_model(rows: Path, tmp_path: Path) -> None:
    folder = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=2, num_key_value_heads=2)
    given = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "compensate": False, "lora_head": None,
             "hio_rank": None, "method": "llm-pruner", "max_steps": 4, "calibration_rows": 8}  # fmt: skip
    recipe = tiny_recipe(folder, rows, shape={"ffn": 96, "kv_groups": 1}, **given)
    start(recipe, tmp_path / "run")
    plan = PruningPlan.load(tmp_path / "run")
    assert plan.method == "llm-pruner"
    # The published method refits nothing.
    assert not plan.weights
    export_run(tmp_path / "run", tmp_path / "pruned")
    down = load_file(tmp_path / "pruned" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (64, 96)


def test_llm_pruner_takes_no_other_score(tiny_base: Path) -> None:
    given = {"model": "m", "data": "d", "method": "llm-pruner", "shape": {"ffn": 96}}
    checkpoint = open_checkpoint(str(tiny_base))
    with pytest.raises(UsageError, match="a Taylor score"):
        LlmPruner.check_base(TrainRecipe(**given, choose={"ffn": "obs"}), checkpoint)
    asked = TrainRecipe(**given, choose={"ffn": "taylor-mixed"}, compensate=True)
    LlmPruner.check_base(asked, checkpoint)
    assert asked.resolved(tied=False, narrows=False).refit == "full"
    assert TrainRecipe(**given).resolved(tied=False, narrows=False).compensate is False


def model_choice(name: str) -> ModelChoice:
    choice = choice_of("ffn", {"ffn": name})
    assert isinstance(choice, ModelChoice)
    return choice


def layer_choice(name: str) -> LayerChoice:
    choice = choice_of("layers", {"layers": name})
    assert isinstance(choice, LayerChoice)
    return choice
