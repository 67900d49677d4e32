"""Training on a model that is smaller along any axis: what leaves the run computes what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import IllegalRatio, IllegalShape, UsageError
from pat_serve.families.architectures import FAMILIES
from pat_serve.run.plan import PruningPlan
from pat_serve.training import PatConfig, apply_pat, save_run
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.checks.width import check_ties, target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import calibrate
from pat_serve.training.model.choice_file import replaced_weights
from pat_serve.training.model.ready import Ready, make_ready
from pat_serve.training.model.slicing import wide_adapter
from pat_serve.training.presets import PAPER
from pat_serve.training.recipe_file import read_recipe
from pat_serve.training.run import resume, start, start_or_resume
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family

LAYERS = 5
DEFAULTS = {"gate": "auto", "rotate": "auto", "mask_start": "auto", "compensate": None, "lora_head": None}
PROMPT = torch.randint(3, 380, (2, 24), generator=torch.Generator().manual_seed(3))


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 380, (4, 6, 32), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[:, 2, 20:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


def recipe_of(base: Path, shape: Mapping[str, int], **settings: Any) -> TrainRecipe:
    """A recipe of the defaults, resolved."""
    adapter = {"lora_rank": 4} if settings.get("train", "lora") == "lora" else {}
    given = {"model": str(base), "data": "d", "shape": dict(shape), "dtype": "float32", **adapter, **settings}
    recipe = TrainRecipe.build(given, "test")
    method = method_of(recipe)
    tied = open_checkpoint(str(base)).tied
    return recipe.resolved(tied=tied, prunes=method.prunes, narrows="hidden" in method.axes)


def ready_of(checkpoint: Checkpoint, recipe: TrainRecipe) -> Ready:
    """The model of a recipe before its first step."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    calibration = None
    if method_of(recipe).wants_calibration(recipe):
        assert recipe.rotate != "auto"
        calibration = calibrate(
            base,
            checkpoint.family,
            checkpoint.num_layers,
            batches(),
            rotate=recipe.rotate,
            keeps_tie=recipe.keeps_tie,
        )
    shape = target_shape(recipe, checkpoint)
    return make_ready(base, checkpoint.family, recipe, shape, 24, calibration=calibration, batches=batches())


@torch.no_grad()
def masked_logits(checkpoint: Checkpoint, ready: Ready) -> Tensor:
    """Logits of the base with a run's results put in by hand, in its shapes: zeros for what is cut, no table asked."""
    method, model = ready.method, AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    for name, weight in replaced_weights(ready.model, method, ready.replaced):
        modules[name.removesuffix(".weight")].weight.copy_(weight)
    named = dict(ready.model.named_parameters())
    lora = {name: tensor.detach() for name, tensor in named.items() if ".lora_" in name}
    wide = wide_adapter(lora, method)
    for name, a in wide.items():
        if ".lora_A." in name:
            target = modules[name.removeprefix("base_model.model.").partition(".lora_A")[0]]
            target.weight += wide[name.replace(".lora_A.", ".lora_B.")] @ a
    cuts, sizes = method.cuts(), method.base
    per_group = sizes.heads // sizes.kv_heads * sizes.head_dim
    for i, layer in enumerate(model.model.layers):
        if f"ffn.{i}" in cuts:
            gone = sorted(set(range(sizes.ffn)) - set(cuts[f"ffn.{i}"].kept.tolist()))
            layer.mlp.down_proj.weight[:, gone] = 0
        if f"kv_groups.{i}" in cuts:
            for group in set(range(sizes.kv_heads)) - set(cuts[f"kv_groups.{i}"].kept.tolist()):
                layer.self_attn.o_proj.weight[:, group * per_group : (group + 1) * per_group] = 0
    kept = cuts.layers_kept(sizes.layers)
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    logits: Tensor = model(PROMPT, use_cache=False).logits
    return logits


SHAPES = [{"layers": 3}, {"ffn": 96}, {"kv_groups": 2}, {"layers": 3, "ffn": 96, "kv_groups": 2}]


# Llama has every cut, and the others all of them at once.
EVERY = [
    pytest.param(kind, shape, refit, marks=() if kind == "llama" or shape == SHAPES[-1] else pytest.mark.slow)
    for kind in ("llama", "qwen2", "phi3")
    for shape in SHAPES
    for refit in ("full", "lora")
]


@pytest.mark.parametrize(("model_type", "shape", "refit"), EVERY)
def test_what_is_trained_is_what_the_run_leaves(model_type: str, shape: dict[str, int], refit: str, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", model_type, num_hidden_layers=LAYERS, num_attention_heads=8,
                            num_key_value_heads=4)  # fmt: skip
    checkpoint = open_checkpoint(str(base))
    ready = ready_of(checkpoint, recipe_of(base, shape, refit=refit, lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in ready.model.named_parameters():
            if ".lora_" in name:
                # The adapter is as it could be after some steps.
                parameter.add_(torch.randn_like(parameter) * 0.05)
        trained = ready.model.eval()(input_ids=PROMPT).logits
    wanted = masked_logits(checkpoint, ready)
    assert (trained - wanted).abs().max() < 2e-5 * wanted.std()
    # The steps are the smaller model's.
    target = ready.method.target
    decoder = ready.model.get_base_model().model
    assert len(decoder.layers) == target.layers
    sizes = {name: tuple(p.shape) for name, p in decoder.layers[0].named_parameters() if "base_layer" in name}
    assert sizes["mlp.down_proj.base_layer.weight"] == (64, target.ffn)
    assert sizes["self_attn.o_proj.base_layer.weight"] == (64, target.heads * target.head_dim)


@pytest.mark.parametrize("shape", [{"hidden": 48, "ffn": 96}, {"hidden": 48, "layers": 3, "kv_groups": 1}], ids=str)
def test_a_run_along_several_axes_is_resumed_to_the_bit(shape: dict[str, int], rows: Path, tmp_path: Path):
    base, run = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS), tmp_path / "run"
    settings = {**DEFAULTS, "hio_rank": None, "lora_dropout": 0.05, "max_steps": 6, "save_steps": 3}
    start(tiny_recipe(base, rows, shape=shape, refit="full", calibration_rows=8, **settings, lora_rank=40), run)
    plan = PruningPlan.load(run)
    sizes = open_checkpoint(str(base)).sizes
    assert plan.cuts.sizes(sizes) == sizes.with_counts(shape)
    assert plan.weights
    results = [path for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    before = {path: path.read_bytes() for path in results}
    (run / "plan.json").unlink()
    (run / "checkpoints/step-6").rename(tmp_path / "gone")
    resume(run)
    assert {path: path.read_bytes() for path in results} == before
    # The adapter is of the base's shapes, zeros for what was dropped; and the training was of the smaller ones.
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    dropped = set(range(LAYERS)) - set(plan.cuts.layers_kept(LAYERS))
    linears = {name.partition(".lora_")[0] for name in adapter}
    assert len(linears) == 7 * LAYERS + 1
    assert len(adapter) == 2 * len(linears)
    rank = adapter["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape[0]
    for name, tensor in adapter.items():
        # More than the outputs of a group.
        assert tensor.shape["lora_B" in name] == rank
        if "layers." in name and "lora_A" in name:
            layer = int(name.partition("layers.")[2].partition(".")[0])
            assert "down_proj" not in name or tensor.shape[1] == sizes.ffn
            assert bool(tensor.any()) == (layer not in dropped)


def test_no_step_at_all_leaves_the_cut_model(rows: Path, tmp_path: Path):
    base, run = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS), tmp_path / "run"
    settings = {**DEFAULTS, "hio_rank": None, "max_steps": 0, "calibration_rows": 8, "refit": "full"}
    recipe = tiny_recipe(base, rows, shape={"layers": 4, "ffn": 96}, **settings)
    finished = start(recipe, run)
    assert (finished.steps, finished.train_loss) == (0, None)
    plan = PruningPlan.load(run)
    assert plan.method == "cut"
    assert len(plan.cuts["layers"].kept) == 4
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_notebook_cuts_and_saves_the_same_way(tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    examples = [{"input_ids": row.tolist()} for batch in batches() for row in batch["input_ids"]]
    config = PatConfig(shape={"layers": 4, "ffn": 96}, choose={"layers": "last"}, lora_rank=4, refit="full")
    model = apply_pat(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config, calibration=examples)
    assert model.get_base_model().model.layers[0].mlp.down_proj.weight.shape == (64, 96)
    # The callback says so when a Trainer has come to its end.
    model.pat.trained = True
    run = save_run(model, tmp_path / "run", prompts=[[3, 4, 5]])
    plan = PruningPlan.load(run)
    assert plan.method == "cut"
    assert plan.cuts.layers_kept(LAYERS) == [0, 1, 3, 4]
    replaced = [name for file in plan.weights for name in load_file(run / "weights" / file)]
    # Every output of an attention and an MLP makes up for what came before it.
    writers = ("mlp.down_proj", "self_attn.o_proj")
    assert sorted(replaced) == [f"model.layers.{i}.{writer}.weight" for i in (0, 1, 3, 4) for writer in writers]


@pytest.mark.parametrize("shape", [{"ffn": 80}, {"kv_groups": 2}, {"layers": 3}, {"hidden": 48}], ids=str)
def test_a_refit_is_nearer_to_the_dense_model(shape: dict[str, int], tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS, num_attention_heads=8,
                            num_key_value_heads=4)  # fmt: skip
    checkpoint = open_checkpoint(str(base))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wanted = [dense(**{name: b[name] for name in ("input_ids", "attention_mask")}).logits for b in batches()]

    def distance(refit: str) -> float:
        made_up = {"compensate": False} if refit == "none" else {"refit": refit}
        model = ready_of(checkpoint, recipe_of(base, shape, **made_up)).model.eval()
        total = 0.0
        for batch, dense_BTV in zip(batches(), wanted, strict=True):
            with torch.no_grad():
                cut_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            real = batch["attention_mask"].bool()
            total += float((cut_BTV - dense_BTV)[real].square().mean())
        return total

    none, low, full = (distance(refit) for refit in ("none", "lora", "full"))
    assert full < low < none


@pytest.mark.parametrize("refit", ["lora", "full"])
@pytest.mark.parametrize("shape", [{"ffn": 80}, {"layers": 3}], ids=str)
def test_a_refit_that_is_held_back_wholly_changes_nothing(shape: dict[str, int], refit: str, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    checkpoint, ids = open_checkpoint(str(base)), batches()[0]["input_ids"]

    def logits(**made_up: Any) -> torch.Tensor:
        with torch.no_grad():
            return ready_of(checkpoint, recipe_of(base, shape, **made_up)).model.eval()(input_ids=ids).logits

    none, held = logits(compensate=False), logits(refit=refit, refit_shrinkage=1e9)
    torch.testing.assert_close(held, none, rtol=0, atol=1e-4 * float(none.std()))
    assert float((logits(refit=refit) - none).abs().max()) > 1e-2 * float(none.std())


def test_the_preflight_counts_what_is_trained(tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    checkpoint, shape = open_checkpoint(str(base)), {"hidden": 48, "layers": 3, "ffn": 96, "kv_groups": 1}
    recipe = recipe_of(base, shape)
    estimate = estimate_training(checkpoint, recipe, "float32", shape, 24, 64, "cpu")
    model = ready_of(checkpoint, recipe).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mask = 64  # its logits, which a closed gate does not train
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) - mask
    assert estimate.lora_parameters + estimate.method_parameters in (trained, trained + mask)
    assert estimate.base_parameters == frozen


def asked_of(base: Path, settings: dict[str, Any]) -> dict[str, int]:
    """The checks that settings pass before a weight is read."""
    recipe = TrainRecipe.build({"model": str(base), "data": "d", **settings}, "test")
    method = method_of(recipe)
    recipe = recipe.resolved(tied=False, prunes=method.prunes, narrows="hidden" in method.axes)
    return target_shape(recipe, open_checkpoint(str(base)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"shape": {"layers": 9}}, IllegalShape, "the base's 5"),
        ({"shape": {"layers": 5}}, IllegalShape, "changes nothing"),
        ({"shape": "layers=3,layers=4"}, IllegalShape, "twice"),
        ({"shape": "depth=3"}, IllegalShape, "axes among"),
        ({"shape": "hidden=48,layers=3", "ratio": 0.25}, UsageError, "one of them"),
        ({"shape": "layers=3", "method": "pat"}, UsageError, "hidden in --shape"),
        ({"shape": "layers=3", "method": "lora"}, UsageError, "cuts nothing"),
        ({"method": "lora", "refit_shrinkage": 1}, UsageError, "--refit-shrinkage: expected none"),
        ({"shape": "ffn=96", "compensate": False, "refit_shrinkage": 1}, UsageError, "or compensate"),
        ({"shape": "ffn=96", "refit_shrinkage": -1}, UsageError, "refit_shrinkage"),
        ({"method": "cut"}, UsageError, "--shape with counts, or --axes"),
        ({"method": "cut", "ratio": 0.25}, UsageError, "axes of --method cut: ffn, kv_groups, layers"),
        ({"axes": "layers,ffn", "shape": "layers=3"}, UsageError, "axes say where ratio cuts"),
        ({"axes": "layers,ffn", "hidden_size": 48}, UsageError, "axes say where ratio cuts"),
        ({"axes": "layers,depth"}, UsageError, "'depth' is none"),
        ({"axes": "layers,layers"}, UsageError, "every axis once"),
        ({"axes": "layers", "method": "pat"}, UsageError, "hidden in --axes"),
        ({"axes": "layers", "method": "lora"}, UsageError, "cuts nothing"),
        ({"axes": "layers", "ratio": 0.7}, IllegalRatio, "in .0, 0.6]"),
        ({"axes": "layers", "choose": "ffn=obs"}, UsageError, "is none"),
        ({"axes": "layers", "shape": "layers=3"}, UsageError, "found axes layers, shape layers=3. See"),
        ({"shape": "hidden=50"}, IllegalShape, "hidden as a multiple of 8, not 50.*hidden=48 .*hidden=56 "),
        ({"shape": "layers=3,ffn=100"}, IllegalShape, "ffn as a multiple of 8, not 100.*layers=3,ffn=96 "),
        ({"shape": "layers=3", "rotate": "loss"}, UsageError, "as wide as it is"),
        ({"shape": "layers=3", "choose": "ffn=obs"}, UsageError, "is none"),
        ({"shape": "layers=3", "choose": "layers=best"}, UsageError, "influence or last"),
    ],
)
def test_shapes_that_cannot_be(settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=LAYERS)
    with pytest.raises(error, match=message):
        asked_of(base, settings)


def test_a_tied_head_is_left_alone_where_the_stream_is(tmp_path: Path):
    checkpoint = open_checkpoint(str(save_tiny_family(tmp_path / "base", "llama", tie_word_embeddings=True)))

    def asked(tie: str) -> TrainRecipe:
        settings = {"model": "m", "data": "d", "shape": "layers=1", "tied_embeddings": tie}
        return TrainRecipe.build(settings, "test").resolved(tied=True, narrows=False)

    for tie in ("auto", "keep"):
        check_ties(asked(tie), checkpoint)
    with pytest.raises(UsageError, match="--method cut leaves the stream and the head as they are"):
        check_ties(asked("untie"), checkpoint)


def test_the_names_of_a_runs_config_are_read_back(tmp_path: Path):
    """A shape as a flag and as a recipe's line are one setting."""
    for size in ({"shape": "ffn=96,layers=3"}, {"axes": "ffn, layers", "ratio": 0.25}):
        flags = TrainRecipe.build({"model": "m", "data": "d", **size, "choose": "layers=last"}, "flags")
        assert flags.method == "cut"
        assert flags.inner_axes == ["layers", "ffn"]
        flags.save(tmp_path)
        assert TrainRecipe.build(read_recipe(tmp_path / "recipe.yaml"), "file") == flags


def test_families_have_a_config_to_tell(tmp_path: Path):
    """Every family's decoder is told of its heads and layers without touching the model's own config."""
    for model_type in FAMILIES:
        base = save_tiny_family(tmp_path / model_type, model_type, num_hidden_layers=3)
        ready = ready_of(open_checkpoint(str(base)), recipe_of(base, {"layers": 2, "kv_groups": 1}))
        model: Any = ready.model
        assert model.get_base_model().config.num_hidden_layers == 3
        assert model.get_base_model().model.config.num_attention_heads == 2
        assert AutoConfig.from_pretrained(base).num_attention_heads == 4
        assert model(input_ids=PROMPT).logits.isfinite().all()


def test_the_ratio_of_a_tied_base_goes_along_layers_and_ffn(rows: Path, tmp_path: Path, capsys):
    """Where nothing is said of what is cut; and asked for again, the run is the same."""
    base = save_tiny_family(tmp_path / "base", "llama", num_hidden_layers=8, tie_word_embeddings=True)
    run = tmp_path / "run"
    recipe = TrainRecipe.build({"model": str(base), "data": str(rows), "max_steps": 0, "calibration_rows": 8}, "test")
    finished = start(recipe, run)
    assert set(finished.shape) == {"hidden", "layers", "ffn"}
    assert finished.shape["hidden"] == 64
    sizes = open_checkpoint(str(base)).sizes
    assert 1 - sizes.with_counts(finished.shape).parameters / sizes.parameters == pytest.approx(0.25, abs=0.01)
    assert "since the base is tied" in capsys.readouterr().err
    assert read_recipe(run / "recipe.yaml")["axes"] == ["layers", "ffn"]
    assert start_or_resume(recipe, run) is None


@pytest.mark.parametrize(
    ("settings", "tied", "layers", "axes"),
    [
        ({}, True, 8, ("layers", "ffn")),
        ({"ratio": 0.4, "refit": "lora"}, True, 30, ("layers", "ffn")),
        ({}, False, 8, ()),
        ({}, True, 7, ()),
        ({"method": "pat"}, True, 8, ()),
        ({"rotate": "loss"}, True, 8, ()),
        ({"lora_head": True}, True, 8, ()),
        (PAPER, True, 8, ()),
        ({"hidden_size": 48}, True, 8, ()),
        ({"shape": "layers=6"}, True, 8, ()),
        ({"axes": "kv_groups"}, True, 8, ("kv_groups",)),
    ],
)
def test_what_says_where_the_ratio_goes(settings: dict[str, Any], tied: bool, layers: int, axes: tuple[str, ...]):
    recipe = TrainRecipe.build({"model": "m", "data": "d", **settings}, "test").with_axes(tied=tied, layers=layers)
    assert recipe.axes == axes
    assert recipe.method == ("cut" if axes or settings.get("shape") else "pat")
