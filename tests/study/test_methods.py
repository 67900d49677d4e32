"""Methods that the study trains and the product does not: dense operators and a mask for every writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.exported import export, train_and_export
from benchmarks.study import measuring, operator_cost, runs
from benchmarks.study.dense_operator import DenseModule
from benchmarks.study.methods import ALIGNED, SWEEPS, Job
from benchmarks.study.separate_masks import SeparateMasks, align, common_channels, uneven_widths, writer_scores
from pat_serve.cut.hybrid import apply_hybrid
from pat_serve.run.plan import PruningPlan
from pat_serve.training.methods.pat.hsm import SharedMask
from pat_serve.training.methods.pat.schedule import GateSchedule
from tests.conftest import tiny_recipe

D = 16
# A finite difference takes a large step: the norms run in float32 whatever the model's dtype.
STEP = 0.05


def test_a_dense_operator_is_a_matrix() -> None:
    torch.manual_seed(0)
    mask = SharedMask(D, 12, GateSchedule(milestone=10))
    hsm = DenseModule(D, mask)
    x = torch.randn(2, 3, D)
    assert torch.equal(hsm(x), x), "it starts as the identity"
    assert sum(p.numel() for p in hsm.parameters() if p.requires_grad) == D * D + D
    torch.nn.init.normal_(hsm.l1_DR)
    torch.nn.init.normal_(hsm.scale_D)
    mask.set_step(4)
    matrix_DD = torch.eye(D) + hsm.l1_DR
    torch.testing.assert_close(hsm(x), (x @ matrix_DD.T) * hsm.scale_D * mask.gate())
    torch.testing.assert_close(hsm(x), apply_hybrid(x, hsm.operator(), mask.gate()))
    torch.testing.assert_close(hsm.orthonormal(), matrix_DD)


def test_uneven_widths_have_the_mean_asked_for() -> None:
    torch.manual_seed(0)
    scores = {"weak": torch.rand(64), "strong": 10 + torch.rand(64), "middling": 2 * torch.rand(64)}
    widths = uneven_widths(scores, 32)
    assert sum(widths.values()) == 3 * 32
    assert widths["strong"] == 64
    assert 8 <= widths["weak"] < widths["middling"]


def test_the_common_channels_are_those_of_most_writers() -> None:
    gates = [torch.tensor(gate) for gate in ([1.0, 1, 0, 0], [0.5, 0, 1, 0], [1.0, 0, 0, 1])]
    scores = {"a": torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)}
    # The last two votes are equal: the score decides.
    assert common_channels(gates, 2, scores).tolist() == [0, 3]


def test_a_score_is_the_change_of_the_loss_to_first_order(tiny_base: Path) -> None:
    """A channel is scaled by 1 + h, and so is an axis of the turned stream."""
    from transformers import AutoModelForCausalLM

    from pat_serve.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_base))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, 2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    axes = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size))[0]
    site = "model.layers.1.mlp.down_proj"
    # The loss sees one of two tokens, so the change by its channel is the only term of the sum.
    for rotation, direction in ((None, torch.eye(len(axes))[3]), (axes, axes[:, 3])):
        found = writer_scores(model, checkpoint.family, checkpoint.num_layers, [batch], rotation)[site][3]
        losses = []
        for sign in (1, -1):
            along = direction.double()
            handle = model.get_submodule(site).register_forward_hook(
                lambda _m, _i, y, along=along, sign=sign: y + sign * STEP * (y @ along)[..., None] * along
            )
            with torch.no_grad():
                # transformers takes its loss in float32.
                logits_TV = model(input_ids=ids).logits[0, :1]
                losses.append(float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:])))
            handle.remove()
        slope = (losses[0] - losses[1]) / (2 * STEP)
        assert float(found) == pytest.approx(slope**2, rel=1e-2)


def pruned(base: Path, rows: Path, folder: Path, name: str, **own: Any) -> dict[str, Any]:
    """Train and export one of the study's methods at three quarters of the width."""
    runs.register()
    settings = tiny_recipe(base, rows, max_steps=12, gradient_accumulation_steps=1, **own).model_dump()
    return train_and_export(settings, name, folder / "run", folder / "pruned")


def test_a_dense_operator_exports_within_the_parity_gate(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    facts = pruned(tiny_base, rows, tmp_path, "dense operator", method="pat-dense-operator")
    assert facts["parity_max_abs_over_std"] < 1e-3
    fold = next(iter(PruningPlan.load(tmp_path / "run").folds.values()))
    assert torch.equal(fold.l0_RD, torch.eye(len(fold.l0_RD)))
    assert fold.l1_DR.abs().sum() > 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert any("identity_loss" in json.loads(line) for line in lines)


# The even masks of the default are in the next test.
ALIKE = ("the default, one mask by the writers' scores", "the default, a mask a writer, aligned half-way")
MASKS = [
    # One of each recipe in `make test`: every one is a training and two exports.
    pytest.param(name, method, id=name, marks=pytest.mark.slow if name in ALIKE else ())
    for name, method in SWEEPS["masks"].methods.items()
    if "method" in method and name != "the default, a mask a writer"
]


@pytest.mark.parametrize(("name", "method"), MASKS)
def test_separate_masks_are_kept_apart_and_aligned(
    name: str, method: dict[str, Any], tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.register()
    keys = ("method", "rotate", "mask_start", "gate", "compensate", "refit", "lora_head")
    own = {key: method[key] for key in keys if key in method}
    recipe = tiny_recipe(tiny_base, rows, max_steps=12, gradient_accumulation_steps=1, **own)
    scores = runs.scores_of(recipe.model_dump(), name)
    assert all(score_D.any() for score_D in scores.values())
    monkeypatch.setattr(SeparateMasks, "scores", scores)
    facts = pruned(tiny_base, rows, tmp_path, name, **own)
    assert facts["parity_max_abs_over_std"] < 1e-3
    plan = PruningPlan.load(tmp_path / "run")
    kept = {site: int(fold.scale_D.count_nonzero()) for site, fold in plan.folds.items()}
    hidden = plan.cuts["hidden"].width
    width = hidden * 3 // 4
    if "uneven" in name:
        assert sum(kept.values()) == len(kept) * width
        assert len(set(kept.values())) > 1
    else:
        assert set(kept.values()) == {width}
    one = len({tuple(fold.scale_D.nonzero().flatten().tolist()) for fold in plan.folds.values()}) == 1
    assert one == ("one mask" in name or "half-way" in name)
    assert facts["hidden_size"] == (width if one else hidden)
    if one:
        return
    # Rows of zeros, in the embedding's columns and every writer.
    assert measuring.nonzero_parameters(tmp_path / "pruned") < facts["parameters"]
    align(tmp_path / "run", tmp_path / "aligned", width, scores)
    assert export(tmp_path / "aligned", tmp_path / "narrow")["hidden_size"] == width
    aligned = PruningPlan.load(tmp_path / "aligned")
    for site, fold in aligned.folds.items():
        assert torch.equal(fold.scale_D, plan.folds[site].scale_D), "nothing is trained or opened"


def test_a_run_of_separate_masks_is_two_lines(tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "base").symlink_to(tiny_base)
    (tmp_path / "data/tune.jsonl").symlink_to(rows)
    monkeypatch.setattr("benchmarks.study.measuring.quality", lambda *_: {"ppl(a)": 1.0})
    monkeypatch.setattr("benchmarks.study.measuring.speedup", lambda *_: {})
    width = json.loads((tiny_base / "config.json").read_text())["hidden_size"]
    method = {"method": "pat-mask-per-writer", "hio_rank": 0}
    lines = runs.run(tmp_path, Job(name="x", ratio=0.25, seed=0, method=method), 12, width)
    assert [(line["method"], line["hidden_size"]) for line in lines] == [("x", width), ("x" + ALIGNED, width * 3 // 4)]
    assert lines[0]["nonzero_parameters"] < lines[0]["parameters"]


def test_a_run_that_diverges_is_a_result(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "base").symlink_to(tiny_base)
    (tmp_path / "data/tune.jsonl").symlink_to(rows)
    width = json.loads((tiny_base / "config.json").read_text())["hidden_size"]
    method = {"rotate": "none", "mask_start": "zero", "gate": "anneal", "learning_rate": 1e25, "max_grad_norm": 1e30}
    [line] = runs.run(tmp_path, Job(name="x", ratio=0.25, seed=0, method=method), 12, width)
    assert "finite" in line["diverged"]


def test_operators_take_turns_and_their_numbers_are_counted(tiny_base: Path) -> None:
    runs.register()
    names = ["the default", "the default, HIO 8", "the default, dense operator"]
    costs = operator_cost.measure(tiny_base, {name: SWEEPS["hio"].methods[name] for name in names}, names[0], rounds=2)
    hidden, layers = (
        json.loads((tiny_base / "config.json").read_text())[k] for k in ("hidden_size", "num_hidden_layers")
    )
    writers = 2 * layers + 1
    none, eight, dense = (costs[name]["trained_parameters"] for name in names)
    assert dense - eight == writers * (hidden**2 - 2 * 8 * hidden)
    assert none < eight, "without operators the model is trained at its final width"
    assert costs["the default"]["relative"] == 1
    assert all(cost["low"] <= cost["relative"] <= cost["high"] and cost["step_s"] > 0 for cost in costs.values())
