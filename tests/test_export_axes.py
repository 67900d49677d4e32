"""Every family cut along every axis, alone and together: exported, compared with the masked model, loaded by others."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pat_serve.cut.cuts import Cuts
from pat_serve.cut.hybrid import HybridFold
from pat_serve.cut.rotation import rotate_model
from pat_serve.errors import BrokenPlan, IllegalShape, ParityError
from pat_serve.export.exporter import export_run
from pat_serve.export.rewrite import contents
from pat_serve.families.architectures import FAMILIES
from pat_serve.run.plan import PruningPlan
from tests.random_runs import PROMPT, random_run
from tests.test_export_parity import both_logits
from tests.tiny_models import save_tiny_family

# 4 groups of 2 query heads in 4 layers. A large eps shows a norm that was forgotten.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-2,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "gemma": {"head_dim": 16},
    "phi3": {"sliding_window": 16},
}
SETTINGS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "ffn": "intermediate_size",
    "kv_groups": "num_key_value_heads",
}
SHAPES: dict[str, dict[str, int]] = {
    "hidden": {"hidden": 48},
    "layers": {"layers": 3},
    "ffn": {"ffn": 88},
    "kv_groups": {"kv_groups": 2},
    "layers and ffn": {"layers": 2, "ffn": 104},
    "hidden and kv_groups": {"hidden": 40, "kv_groups": 2},
    "all": {"hidden": 48, "layers": 3, "ffn": 88, "kv_groups": 2},
}


def make_run(folder: Path, model_type: str, counts: Mapping[str, int], **settings: Any) -> Path:
    base = save_tiny_family(folder / "base", model_type, **(SIZES | OWN[model_type] | settings))
    return random_run(folder / "run", base, counts=counts)


# Everything at once in every family, each cut once in Llama, and one cut by itself in each of the others.
QUICK = {"hidden": "gemma", "ffn": "phi3", "kv_groups": "qwen3", "hidden and kv_groups": "qwen2", "layers": "mistral"}
EVERY = [
    pytest.param(kind, name, marks=() if name == "all" or kind in ("llama", QUICK.get(name)) else pytest.mark.slow)
    for name in SHAPES
    for kind in FAMILIES
]


@pytest.mark.parametrize(("model_type", "shape"), EVERY)
def test_exported_and_equal(model_type: str, shape: str, tmp_path: Path):
    counts = SHAPES[shape]
    run = make_run(tmp_path, model_type, counts)
    done = export_run(run, tmp_path / "out", walk=len(counts) > 2)
    assert done.parity is not None
    assert done.parity.layerwise == (len(counts) > 2)
    assert done.parity.logits_std > 0.1
    assert done.parity.max_abs_over_std < 2e-5
    wide, narrow = both_logits(run, done.out, torch.float32)
    assert (wide - narrow).abs().max() / wide.std() < 2e-5

    config = json.loads((done.out / "config.json").read_text())
    assert {axis: config[SETTINGS[axis]] for axis in counts} == counts
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert len(config.get("layer_types") or range(counts.get("layers", 4))) == config["num_hidden_layers"]
    turns = model_type == "qwen2" and not counts.keys().isdisjoint({"hidden", "kv_groups"})
    architecture = "LlamaForCausalLM" if turns else FAMILIES[model_type].architecture
    assert config["architectures"] == [architecture] == [done.record["architecture"]]
    assert {line.split(".")[0] for line in done.record["cuts"]} == set(counts)
    for name in counts:
        sizes = done.record["shape"][SETTINGS[name]]
        assert f"| {SETTINGS[name]} | {sizes['base']} | {counts[name]} |" in (done.out / "README.md").read_text()


def test_stock_transformers_loads_them_without_this_package(tmp_path: Path):
    """Logits of a process that cannot import this package are those of the masked models."""
    wanted = {}
    for model_type in FAMILIES:
        run = make_run(tmp_path / model_type, model_type, SHAPES["all"])
        out = export_run(run, tmp_path / model_type / "out", parity=False).out
        wanted[model_type] = both_logits(run, out, torch.float32)[0]
    script = (
        "import sys; sys.modules['pat_serve'] = None\n"
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"prompt, found = torch.tensor({PROMPT.tolist()}), {{}}\n"
        f"for name in {list(wanted)}:\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + f'/{{name}}/out', dtype=torch.float32)\n"
        "    found[name] = model.eval()(input_ids=prompt).logits.detach().contiguous()\n"
        f"save_file(found, {str(tmp_path / 'logits.safetensors')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    for model_type, logits in load_file(tmp_path / "logits.safetensors").items():
        assert (logits - wanted[model_type]).abs().max() / wanted[model_type].std() < 2e-5, model_type


@pytest.mark.parametrize("shape", ["layers and ffn", "kv_groups"])
@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_a_tie_stays_where_nothing_unties(model_type: str, shape: str, tmp_path: Path):
    run = make_run(tmp_path, model_type, SHAPES[shape], tie_word_embeddings=True)
    done = export_run(run, tmp_path / "out")
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    tensors = load_file(done.out / "model.safetensors")
    assert "lm_head.weight" not in tensors
    stored = load_file(tmp_path / "base/model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "counts", [{"kv_groups": 3}, {"hidden": 56, "kv_groups": 3}, {"hidden": 56, "layers": 2, "kv_groups": 3}]
)
def test_what_llama_refuses_is_written_as_a_mistral(counts: dict[str, int], tmp_path: Path):
    """6 heads divide neither 64 nor 56."""
    done = export_run(make_run(tmp_path, "llama", counts), tmp_path / "out")
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    assert done.record["architecture"] == "MistralForCausalLM"
    assert "A LlamaForCausalLM of these sizes is written as the same MistralForCausalLM." in done.parity.notes
    model = AutoModelForCausalLM.from_pretrained(done.out)
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.sliding_window is None


def test_what_no_class_takes_is_refused_before_anything_is_written(tmp_path: Path):
    run = make_run(tmp_path, "qwen2", {"kv_groups": 3})
    with pytest.raises(IllegalShape, match=r"in 3 groups: LlamaForCausalLM wants .* its 6 heads, not 64"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REPLACED = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight",
)


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("kind", ["tied", "a head of its own", "rotated", "rotated, with the base's head"])
def test_replaced_weights_take_the_place_of_the_bases(kind: str, walk: bool, tmp_path: Path):
    tied = kind != "a head of its own"
    settings = SIZES | OWN["llama"] | {"tie_word_embeddings": tied}
    base = save_tiny_family(tmp_path / "base", "llama", **settings)
    replaced = [*REPLACED, *(["lm_head.weight"] if kind in ("a head of its own", "rotated") else [])]
    run = random_run(tmp_path / "run", base, counts=SHAPES["all"], replaced=replaced)
    plan = PruningPlan.load(run)
    if "rotated" in kind:
        plan = dataclasses.replace(plan, rotation=torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q)
    if kind == "tied":
        plan = dataclasses.replace(plan, folds=diagonal_folds(plan))
    plan.save(run)
    done = export_run(run, tmp_path / "out", walk=walk)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    assert done.parity.notes == (f"The run replaced {len(replaced)} of the base's tensors; both models have them.",)
    assert ("lm_head.weight" in load_file(done.out / "model.safetensors")) == (kind != "tied")
    # Without them it is another model.
    dataclasses.replace(PruningPlan.load(run), weights={}).save(run)
    other, narrow = both_logits(run, done.out, torch.float32)
    assert (narrow - other).abs().max() / other.std() > 0.1


def diagonal_folds(plan: PruningPlan) -> dict[str, HybridFold]:
    """The same operators without their ranks, so that a tied head can divide by what the embedding carries."""
    none = torch.zeros(0, 64)
    return {
        site: HybridFold(l0_RD=none, l1_DR=none.T, scale_D=fold.scale_D.clamp(min=0.5))
        for site, fold in plan.folds.items()
    }


def partial_rotation(channels: list[int]) -> torch.Tensor:
    """Orthogonal (64, 64), the identity on some channels."""
    others = sorted(set(range(64)) - set(channels))
    rotation = torch.eye(64, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(len(others), len(others), dtype=torch.float64)).Q
    rotation[torch.tensor(others)[:, None], torch.tensor(others)] = turned
    return rotation


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("counts", [{"hidden": 48}, {"hidden": 48, "layers": 3, "ffn": 88}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_a_tie_survives_a_rotation(model_type: str, counts: dict[str, int], walk: bool, tmp_path: Path):
    """The last norm's gain is constant on all channels but those that the rotation leaves alone."""
    base = save_tiny_family(tmp_path / "base", model_type, **SIZES | OWN[model_type] | {"tie_word_embeddings": True})
    run = random_run(tmp_path / "run", base, counts=counts)
    plan = PruningPlan.load(run)
    alone = plan.cuts["hidden"].kept[::6].tolist()
    gain = torch.full((64,), 0.7)
    gain[alone] = torch.randn(len(alone))
    plan = dataclasses.replace(
        plan, rotation=partial_rotation(alone), tied=True, norms={"model.norm": gain}, folds=diagonal_folds(plan)
    )
    plan.save(run)
    done = export_run(run, tmp_path / "out", walk=walk)
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5
    assert "lm_head.weight" not in load_file(done.out / "model.safetensors")
    assert json.loads((done.out / "config.json").read_text())["tie_word_embeddings"]


def test_such_a_rotation_keeps_the_function(tmp_path: Path):
    """Nothing is cut: a model whose last gain is constant but on some channels is itself after the turn."""
    base = save_tiny_family(tmp_path / "base", "llama", **SIZES | OWN["llama"] | {"tie_word_embeddings": True})
    alone = [3, 17, 40]
    gain = torch.full((64,), 0.7)
    gain[alone] = torch.tensor([-2.0, 5.0, 0.1])
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.model.norm.weight.data.copy_(gain)
    with torch.no_grad():
        before = model(input_ids=PROMPT).logits
        rotate_model(model, FAMILIES["llama"], 4, partial_rotation(alone), keeps_tie=True)
        after = model(input_ids=PROMPT).logits
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (after - before).abs().max() / before.std() < 2e-5


@pytest.mark.parametrize("lacking", ["rotation", "norms", "tie"])
def test_a_plan_that_is_tied_to_nothing_is_refused(lacking: str, tmp_path: Path):
    settings = SIZES | OWN["llama"] | {"tie_word_embeddings": lacking != "tie"}
    run = random_run(tmp_path / "run", save_tiny_family(tmp_path / "base", "llama", **settings), counts={"hidden": 48})
    plan = PruningPlan.load(run)
    rotation = None if lacking == "rotation" else torch.eye(64)
    norms = {} if lacking == "norms" else {"model.norm": torch.ones(64)}
    dataclasses.replace(plan, rotation=rotation, norms=norms, tied=True, folds=diagonal_folds(plan)).save(run)
    with pytest.raises(BrokenPlan, match="a tie that a rotation leaves"):
        export_run(run, tmp_path / "out")


MISTAKEN = {"groups": "self_attn.o_proj", "channels": "mlp.up_proj", "layers": "mlp.down_proj"}


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("mistake", ["groups", "channels", "layers"])
def test_a_wrong_slice_is_refused(mistake: str, walk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A neighbour's choice, or a layer that is kept in place of another, has the right shapes and is another model."""
    run = make_run(tmp_path, "llama", {"layers": 3, "ffn": 88, "kv_groups": 2})
    right = contents.targets

    def wrong(family: Any, cuts: Cuts, *others: Any) -> dict[str, Any]:
        found = right(family, cuts, *others)
        first, last = (found[f"model.layers.{i}.{MISTAKEN[mistake]}.weight"] for i in cuts.layers_kept(4)[:2])
        if mistake == "layers":
            swapped = [dataclasses.replace(first, name=last.name), dataclasses.replace(last, name=first.name)]
        else:
            swapped = [dataclasses.replace(first, kept=last.kept)]
        return found | {target.source: target for target in swapped}

    monkeypatch.setattr(contents, "targets", wrong)
    with pytest.raises(ParityError, match="Nothing was exported"):
        export_run(run, tmp_path / "out", walk=walk)
    assert not (tmp_path / "out").exists()
