"""The gate layer by layer gives the figures that the whole models give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pat_serve.cut.hybrid import HybridFold
from pat_serve.errors import ParityError
from pat_serve.export.exporter import export_run
from pat_serve.export.parity.gate import measure_parity
from pat_serve.export.parity.layerwise import LayerwiseModel
from pat_serve.export.run.reader import open_run
from pat_serve.run.plan import PruningPlan
from tests.random_runs import random_run
from tests.tiny_models import save_tiny_family, save_tiny_llama


@pytest.mark.parametrize(
    "variant", ["rotated, with a head's adapter", "tied", "padded", "Gemma, tied", "Qwen2", "Phi-3"]
)
def test_layer_by_layer_gives_the_same_figures(variant: str, tmp_path: Path):
    """Two ways to compute each model; one that lost an operator, an adapter or a row would give other figures."""
    if variant == "rotated, with a head's adapter":
        base = save_tiny_llama(tmp_path / "base")
        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        run_folder = random_run(tmp_path / "run", base, lora={"target_modules": every}, save_embedding_layers=False)
        rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
        dataclasses.replace(PruningPlan.load(run_folder), rotation=rotation).save(run_folder)
    elif variant == "tied":
        run_folder = random_run(tmp_path / "run", save_tiny_llama(tmp_path / "base", tie_word_embeddings=True))
    elif variant == "padded":
        # The gate's prompts use fewer rows of the embedding than this row's number.
        run_folder = random_run(tmp_path / "run", save_tiny_llama(tmp_path / "base", pad_token_id=383))
    else:
        model_type = variant.split(",")[0].lower().replace("-", "")
        run_folder = random_run(tmp_path / "run", save_tiny_family(tmp_path / "base", model_type))
    plan = PruningPlan.load(run_folder)
    if "tied" in variant:
        fold = plan.folds["model.embed_tokens"]
        diagonal = HybridFold(l0_RD=fold.l0_RD[:0], l1_DR=fold.l1_DR[:, :0], scale_D=fold.scale_D.clamp(min=0.5))
        dataclasses.replace(plan, folds={**plan.folds, "model.embed_tokens": diagonal}).save(run_folder)
    out = export_run(run_folder, tmp_path / "out", dtype="bfloat16", parity=False).out
    run = open_run(run_folder)
    loaded, walked = (measure_parity(run, out, torch.bfloat16, walk=walk) for walk in (False, True))
    assert not loaded.layerwise
    assert walked.layerwise
    assert loaded.passed
    assert walked.passed
    for first, second in zip(loaded.comparisons, walked.comparisons, strict=True):
        assert (first.model, first.dtype) == (second.model, second.dtype)
        if first.dtype == "float32":
            # The first comparison's figures are additions in another order, and nothing but those.
            close = {"abs": 1e-5} if first.figures.max_abs_over_std < 1e-4 else {"rel": 1e-2}
            assert second.figures.max_abs_over_std == pytest.approx(first.figures.max_abs_over_std, **close)
            assert second.figures.logits_std == pytest.approx(first.figures.logits_std, rel=1e-5)


def test_a_model_that_does_not_fit_is_walked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Never more than one layer's weights, the rows of the embedding and a block of the head."""
    base = save_tiny_llama(tmp_path / "base", num_hidden_layers=4)
    run = random_run(tmp_path / "run", base)
    held: list[int] = []
    fetch = LayerwiseModel._fetch

    def watch(self: LayerwiseModel, *arguments: object, **settings: object) -> None:
        fetch(self, *arguments, **settings)
        linears = [m for m in self.model.model.layers.modules() if type(m) is torch.nn.Linear and m.bias is None]
        own = [m for m in linears if m.out_features > 8 and m.in_features > 8]
        held.append(sum(m.weight.device.type != "meta" for m in own))

    monkeypatch.setattr(LayerwiseModel, "_fetch", watch)
    monkeypatch.setattr("pat_serve.export.parity.models.available_memory_bytes", lambda: 1 << 20)
    done = export_run(run, tmp_path / "out")
    assert done.parity is not None
    assert done.parity.layerwise
    assert done.parity.max_abs_over_std < 1e-5
    # Seven linears a layer.
    assert max(held) == 7


@pytest.mark.parametrize("walk", [False, True])
def test_a_wrong_rewriting_is_refused_layer_by_layer_too(walk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pat_serve.export.rewrite.config.exported_eps", lambda eps, cut: eps)
    run = random_run(tmp_path / "run", save_tiny_llama(tmp_path / "base", rms_norm_eps=1e-3))
    with pytest.raises(ParityError, match="Nothing was exported"):
        export_run(run, tmp_path / "out", walk=walk)
    assert not (tmp_path / "out").exists()
