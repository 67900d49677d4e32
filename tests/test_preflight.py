"""The estimate of a training's memory, and the refusal of one that cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.errors import TooLarge
from pat_serve.training.checks import preflight
from pat_serve.training.checks.memory import BatchSize
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.config import TrainRecipe
from pat_serve.training.model.calibration import Calibration
from pat_serve.training.model.insert import adapt
from pat_serve.training.model.norms import train_norms
from pat_serve.training.model.slicing import slice_model
from pat_serve.training.presets import PAPER
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Small, with a tied head and fewer key-value heads: what a count by hand gets wrong."""
    folder = tmp_path_factory.mktemp("base") / "tied"
    return open_checkpoint(str(save_tiny_llama(folder, tie_word_embeddings=True)))


@pytest.mark.parametrize("method", ["pat", "lora"])
def test_parameters_are_those_of_the_model_that_is_trained(method: str, checkpoint: Checkpoint):
    recipe = tiny_recipe(checkpoint.folder, Path("d"), method=method)
    estimate = estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 64, "cpu")
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model, _ = adapt(base, checkpoint.family, recipe, {"hidden": 48}, 24)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert estimate.lora_parameters + estimate.method_parameters == trained
    assert estimate.base_parameters == sum(parameter.numel() for parameter in model.parameters()) - trained
    assert (estimate.method_parameters == 0) == (method == "lora")


@pytest.mark.parametrize("tie", [None, "keep", "untie"])
def test_the_default_recipe_is_counted_as_it_is_trained(tie: str | None, rows: Path, tmp_path: Path):
    """Cut from the start its operators have no rank, and a rotation may give a tied base a head of its own."""
    opened = open_checkpoint(str(save_tiny_llama(tmp_path / "base", tie_word_embeddings=tie is not None)))
    unset = {name: TrainRecipe.model_fields[name].default for name in (*PAPER, "hio_rank")}
    recipe = tiny_recipe(opened.folder, rows, **unset | {"tied_embeddings": tie or "auto"})
    recipe = recipe.resolved(tied=tie is not None)
    calibration = [BatchSize(rows=4, length_tokens=64, labelled_tokens=252)] * 2
    estimate = estimate_training(opened, recipe, "float32", {"hidden": 48}, 24, 64, "cpu", calibration)
    base = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32)
    gain = torch.ones(64) if tie == "keep" else None
    measured = Calibration(importance_D=torch.linspace(1, 0, 64), rotation_DD=torch.eye(64), last_gain_D=gain)
    model, method = adapt(base, opened.family, recipe, {"hidden": 48}, 24, measured)
    slice_model(model, method, method.cuts())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert estimate.lora_parameters + estimate.method_parameters == trained
    frozen = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and "pat_mask" not in name)
    assert estimate.base_parameters == frozen
    assert estimate.weights_bytes == 4 * frozen
    # The model is calibrated whether or not it is cut.
    uncut = recipe.model_copy(update={"narrow": "off"})
    wide = estimate_training(opened, uncut, "float32", {"hidden": 48}, 24, 64, "cpu", calibration)
    assert wide.preparing_bytes == estimate.preparing_bytes
    assert estimate.weights_bytes < wide.weights_bytes < estimate.preparing_bytes < wide.total_bytes
    assert estimate.activations_bytes < wide.activations_bytes


@pytest.mark.parametrize(("narrow", "norms"), [(False, False), (True, False), (True, True)])
def test_activations_are_what_autograd_keeps(narrow: bool, norms: bool, checkpoint: Checkpoint):
    """Counted on the real graph: every tensor that is saved for the backward pass and is no parameter."""
    cut = {"gate": "cut", "mask_start": "energy", "hio_rank": 0} if narrow else {}
    recipe = tiny_recipe(checkpoint.folder, Path("d"), train_norms=norms, **cut)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    measured = Calibration(importance_D=torch.linspace(1, 0, 64), rotation_DD=None)
    model, method = adapt(base, checkpoint.family, recipe, {"hidden": 48}, 24, measured)
    method.on_step(0)
    if narrow:
        slice_model(model, method, method.cuts())
    if norms:
        train_norms(model, method)
    model.train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 384, (recipe.batch_size, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    log_probabilities = ids.numel() * 384 * 4
    measured = sum(storage.nbytes() for storage in saved.values()) - log_probabilities
    estimate = estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 128, "cpu")
    assert estimate.activations_bytes == pytest.approx(measured, rel=0.15)
    if norms:
        without = recipe.model_copy(update={"train_norms": False})
        plain = estimate_training(checkpoint, without, "float32", {"hidden": 48}, 24, 128, "cpu")
        # Two norms of 48 in each of two layers, and the final one.
        assert estimate.method_parameters - plain.method_parameters == 5 * 48


def test_processes_of_fsdp_prepare_in_the_hosts_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(checkpoint.folder, Path("d"), mask_start="energy")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sizes = [BatchSize(rows=4, length_tokens=64, labelled_tokens=252)]
    host, gpu = (
        estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 64, on, sizes) for on in ("cpu", "cuda")
    )
    assert host.preparing_bytes > 0
    assert gpu.preparing_bytes == 0


def test_the_estimate_follows_its_causes(checkpoint: Checkpoint):
    def size(dtype: str = "float32", device: str = "cpu", **settings: object) -> preflight.Preflight:
        recipe = tiny_recipe(checkpoint.folder, Path("d"), **settings)
        return estimate_training(checkpoint, recipe, dtype, {"hidden": 48}, 24, 64, device)

    plain = size()
    assert plain.tokens_per_step == 4 * 2 * 64
    assert size(batch_size=8).activations_bytes == 2 * plain.activations_bytes
    assert size(batch_size=8).logits_bytes == 2 * plain.logits_bytes
    assert size(gradient_checkpointing=True).activations_bytes < plain.activations_bytes
    assert size("bfloat16").weights_bytes * 2 == plain.weights_bytes
    assert size("bfloat16").trained_bytes == plain.trained_bytes
    assert size("bfloat16", quantize_base="nf4").weights_bytes < 0.8 * size("bfloat16").weights_bytes
    # Logits, their gradient and the teacher's; without a teacher log-probabilities and two gradients.
    assert size(distillation_weight=0.5).logits_bytes == plain.logits_bytes
    assert size(lora_dropout=0.0).activations_bytes < size(device="cuda").activations_bytes < plain.activations_bytes


def test_fsdp_holds_a_share(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(checkpoint.folder, Path("d"))
    whole = estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 64, "cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    every = estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 64, "cuda")
    assert (every.weights_bytes, every.trained_bytes) == (whole.weights_bytes, whole.trained_bytes)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    share = estimate_training(checkpoint, recipe, "float32", {"hidden": 48}, 24, 64, "cuda")
    assert share.weights_bytes == pytest.approx(whole.weights_bytes * (1 / 8 + 1 / 2), rel=1e-3)
    assert share.trained_bytes == whole.trained_bytes // 8
    assert share.activations_bytes == whole.activations_bytes


def test_what_cannot_fit_is_refused_before_it_loads(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The machine's memory is the one thing here that is not the real one."""
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 50_000_000)
    with pytest.raises(TooLarge, match=r"expected at most 0.05 GB.*--gradient-checkpointing.*--skip-preflight"):
        start(tiny_recipe(tiny_base, rows), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    # A setting that the recipe has already is no way out.
    used = {"gradient_checkpointing": True, "batch_size": 1, "dtype": "bfloat16"}
    with pytest.raises(TooLarge) as caught:
        start(tiny_recipe(tiny_base, rows, **used), tmp_path / "run")
    assert caught.value.fix == "Lower --max-length-tokens, or override this estimate with --skip-preflight."
    start(tiny_recipe(tiny_base, rows, max_steps=12, skip_preflight=True), tmp_path / "run")
    said = capsys.readouterr().err
    assert "M trained (LoRA" in said


def test_a_batch_that_no_machine_holds(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(TooLarge, match="GB"):
        start(tiny_recipe(tiny_base, rows, batch_size=10_000_000), tmp_path / "run")
