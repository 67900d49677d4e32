"""The memory that calibration, rotation and compensation hold at once, against the pre-flight's count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.training.checks.memory import BatchSize, weights_bytes
from pat_serve.training.checks.preflight import estimate_training
from pat_serve.training.config import TrainRecipe
from pat_serve.training.model import compensation
from pat_serve.training.model.calibration import Calibration, calibrate, calibration_batches
from pat_serve.training.model.insert import adapt, load_base
from pat_serve.training.model.ready import make_ready
from tests.compensating import make_up
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_family, save_tiny_llama

CUT = {"gate": "cut", "mask_start": "energy", "hio_rank": 0}
# A head of so many rows is turned and compensated in pieces.
LARGE_VOCABULARY = 9000


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, made since it began, that were alive at once; what an operator frees is unseen."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.before = {weight.untyped_storage().data_ptr() for weight in weights}
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.before:
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def samples(*lengths: int) -> list[dict[str, list[int]]]:
    ids = [[3 + at % 300 for at in range(length)] for length in lengths]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]


def most_held(opened: Checkpoint, recipe: TrainRecipe, dtype: torch.dtype, batches: list[dict[str, Any]]) -> int:
    base = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=dtype)
    by_gradient = recipe.mask_start == "gradient"
    with LiveBytes(list(base.parameters())) as measuring:
        measured = calibrate(
            base, opened.family, 2, batches, rotate=recipe.rotate, by_gradient=by_gradient, keeps_tie=recipe.keeps_tie
        )
    with LiveBytes(list(base.parameters())) as turning:
        model, method = adapt(base, opened.family, recipe, {"hidden": 48}, 24, measured)
    method.on_step(0)
    if not recipe.compensate:
        return max(measuring.peak, turning.peak)
    adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    with LiveBytes(list(model.parameters())) as compensating:
        make_up(model, method, batches, "full" if recipe.refit == "full" else "lora")
    return max(measuring.peak, turning.peak, adapter + compensating.peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "vocabulary", "lengths"),
    [
        # In turn what outweighs the rest: a batch's gradient; the same and every weight's; a layer at work; the head
        # as it is turned; the head's change; a branch at work; many rows' states.
        ({"rotate": "loss"}, LARGE_VOCABULARY, (64, 9, 40, 64, 30)),
        ({"mask_start": "gradient"}, LARGE_VOCABULARY, (64, 9, 40, 64, 30)),
        ({}, 384, (128,) * 4),
        ({"rotate": "energy"}, LARGE_VOCABULARY, (9, 8)),
        ({"rotate": "energy", "compensate": True, "lora_head": True}, LARGE_VOCABULARY, (64, 9, 40, 64, 30)),
        ({"rotate": "energy", "compensate": True, "refit": "full"}, LARGE_VOCABULARY, (64, 9, 40, 64, 30)),
        ({"rotate": "energy", "compensate": True, "refit": "full", "tied_embeddings": "keep"}, 384, (9, 8)),
        ({"compensate": True}, 384, (128,) * 4),
        ({"compensate": True}, 384, (64,) * 60),
    ],
    ids=["loss", "gradient", "energy", "turning", "head", "refit", "tie", "branch", "states"],
)
def test_what_is_counted_is_what_is_held(
    settings: dict[str, Any], vocabulary: int, lengths: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
):
    tied = "tied_embeddings" in settings
    opened = open_checkpoint(str(save_tiny_llama(tmp_path / "base", vocab_size=vocabulary, tie_word_embeddings=tied)))
    recipe = tiny_recipe(opened.folder, Path("d"), **CUT | settings)
    batches = calibration_batches(samples(*lengths), recipe.batch_size)
    held = most_held(opened, recipe, dtype, batches)
    name = str(dtype).removeprefix("torch.")
    sizes = [BatchSize.of(batch) for batch in batches]
    counted = estimate_training(opened, recipe, name, {"hidden": 48}, 24, 128, "cpu", sizes).preparing_bytes
    assert counted - weights_bytes(opened, recipe, DTYPE_BYTES[name], opened.sizes) == pytest.approx(held, rel=0.3)


@pytest.mark.parametrize(
    ("family", "window", "rows"),
    [("llama", None, 4), ("mistral", 128, 1), ("qwen2", None, 1), ("mistral", 512, 1)],
    ids=["padded", "beyond a window", "a window unused", "within a window"],
)
def test_states_and_masks_of_all_rows(
    family: str, window: int | None, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Padded in their batches, and not to the longest row of the data."""
    unused = {"use_sliding_window": False, "sliding_window": 64} if family == "qwen2" else {}
    used = {"sliding_window": window} if window else {}
    opened = open_checkpoint(str(save_tiny_family(tmp_path / "base", family, **unused, **used)))
    recipe = tiny_recipe(opened.folder, Path("d"), compensate=True, batch_size=rows, **CUT)
    held: list[torch.Tensor] = []

    def enter(*args: Any) -> Any:
        entry = original(*args)
        held.extend([entry.dense_BTD, entry.cut_BTD])
        held.extend(value for name, value in entry.settings.items() if name == "attention_mask" and value is not None)
        return entry

    original = compensation.enter
    monkeypatch.setattr(compensation, "enter", enter)
    measured = Calibration(importance_D=torch.linspace(1, 0, 64), rotation_DD=None)
    model, method = adapt(load_base(opened, recipe, torch.float32), opened.family, recipe, {"hidden": 48}, 24, measured)
    method.on_step(0)
    batches = calibration_batches(samples(512, 9, 300, 40, 512, 512, 7, 1, 90), recipe.batch_size)
    make_up(model, method, batches)

    def preparing(repeats: int) -> int:
        sizes = [BatchSize.of(batch) for batch in batches] * repeats
        return estimate_training(opened, recipe, "float32", {"hidden": 48}, 24, 10_000, "cpu", sizes).preparing_bytes

    # So often that the states outweigh the rest.
    assert preparing(21) - preparing(20) == pytest.approx(sum(tensor.nbytes for tensor in held), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [({"ffn": 96}, (9, 8)), ({"ffn": 96}, (64,) * 60), ({"layers": 1}, (9, 8)), ({"layers": 1}, (64,) * 60)],
    ids=["channels, few rows", "channels, many rows", "layers, few rows", "layers, many rows"],
)
def test_a_refit_of_all_outputs(shape: dict[str, int], lengths: tuple[int, ...], dtype: torch.dtype, tmp_path: Path):
    """The refit sets every output where layers or FFN channels are cut, and the count of bytes includes that."""
    opened = open_checkpoint(str(save_tiny_llama(tmp_path / "base")))
    recipe = tiny_recipe(opened.folder, Path("d"), shape=shape, compensate=True, refit="full", **CUT)
    batches = calibration_batches(samples(*lengths), recipe.batch_size)
    base = load_base(opened, recipe, dtype)
    whole = {"hidden": 64, **shape}
    with LiveBytes(list(base.parameters())) as preparing:
        make_ready(base, opened.family, recipe, whole, 24, batches=batches)
    name = str(dtype).removeprefix("torch.")
    sizes = [BatchSize.of(batch) for batch in batches]
    counted = estimate_training(opened, recipe, name, whole, 24, 128, "cpu", sizes).preparing_bytes
    held = counted - weights_bytes(opened, recipe, DTYPE_BYTES[name], opened.sizes)
    assert held == pytest.approx(preparing.peak, rel=0.3)
