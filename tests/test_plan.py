"""plan.json and plan.safetensors: what is written comes back, version 1 too, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pat_serve.cut.cuts import AxisCut, Cuts
from pat_serve.errors import BrokenPlan
from pat_serve.run.plan import BaseReference, PruningPlan, file_sha256

BASE = BaseReference(source="base", architecture="LlamaForCausalLM", sha256={"config.json": "0" * 64})
KEPT = torch.tensor([0, 2, 3])


def plan() -> PruningPlan:
    """A plan that cuts two axes."""
    cuts = {"hidden": AxisCut(width=4, kept=KEPT), "layers": AxisCut(width=3, kept=torch.tensor([0, 2]))}
    cuts |= {f"ffn.{i}": AxisCut(width=8, kept=torch.tensor([1, i + 2])) for i in (0, 2)}
    return PruningPlan(
        method="pat",
        base=BASE,
        cuts=Cuts(cuts),
        norms={"model.norm": torch.ones(4)},
        weights={"weights.safetensors": "1" * 64},
        sparsity={"model.layers.0.mlp.up_proj": "2:4"},
    )


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path):
    plan().save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["version"] == 2
    assert document["cuts"]["ffn.2"] == {"width": 8, "kept": 2}
    again = PruningPlan.load(tmp_path)
    assert (again.method, again.base, again.weights, again.sparsity) == (
        "pat",
        BASE,
        plan().weights,
        plan().sparsity,
    )
    assert list(again.cuts) == ["hidden", "layers", "ffn.0", "ffn.2"]
    assert all(again.cuts[line].kept.equal(cut.kept) for line, cut in plan().cuts.items())


def write_version_1(folder: Path, axes: dict[str, torch.Tensor], **changes: Any) -> None:
    """A plan as version 0.1 of this package wrote it."""
    save_file({f"axes.{name}": kept.clone() for name, kept in axes.items()}, folder / "plan.safetensors")
    document = {
        "version": 1,
        "method": "pat",
        "base": BASE.model_dump(),
        "axes": {name: {"width": 4, "kept": len(kept)} for name, kept in axes.items()},
        "folds": [],
        "rotated": False,
        "norms": [],
        "adapter": {},
        "arrays_sha256": file_sha256(folder / "plan.safetensors"),
    }
    (folder / "plan.json").write_text(json.dumps(document | changes))


def test_a_plan_of_version_1_is_read(tmp_path: Path):
    write_version_1(tmp_path, {"hidden": KEPT})
    read = PruningPlan.load(tmp_path)
    assert list(read.cuts) == ["hidden"]
    assert read.cuts["hidden"].kept.equal(KEPT)
    assert (read.weights, read.sparsity) == ({}, {})
    read.save(tmp_path)
    assert PruningPlan.load(tmp_path).cuts["hidden"].kept.equal(KEPT)


@pytest.mark.parametrize("axis", ["ffn.0", "layers", "heads.0"])
def test_an_axis_that_version_1_could_not_have_is_refused(axis: str, tmp_path: Path):
    write_version_1(tmp_path, {"hidden": KEPT, axis: KEPT})
    with pytest.raises(BrokenPlan, match=f"a cut of hidden alone in a plan of version 1, found one of '{axis}'"):
        PruningPlan.load(tmp_path)


def test_what_came_with_version_2_is_refused_in_version_1(tmp_path: Path):
    write_version_1(tmp_path, {"hidden": KEPT}, weights={})
    with pytest.raises(BrokenPlan, match="weights: Extra inputs are not permitted"):
        PruningPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "a plan of version 1 or 2, found version"),
        ({"version": 1}, "version 2 in a plan with cuts of any axis, found version 1"),
        ({"sparsity": {"model.layers.0.mlp.up_proj": "8:4"}}, "sparsity.model.layers.0.mlp.up_proj"),
        ({"cuts": {"heads.0": {"width": 4, "kept": 3}}}, "lines of the axes hidden, .* found 'heads.0'"),
        ({"cuts": {"hidden": {"width": 4, "kept": 0}}}, "cuts.hidden.kept"),
        ({"cuts": {"hidden": {"width": 4, "kept": 2}}}, "ascending indices below 4 for the axis hidden"),
        ({"cuts": {"hidden": {"width": 3, "kept": 3}}}, "ascending indices below 3 for the axis hidden"),
        ({"cuts": {"ffn.1": {"width": 8, "kept": 2}}}, "int64 indices for the axis ffn.1, found none"),
        ({"cuts": {"hidden": {"width": 4, "kept": 3}}}, "the arrays that plan.json names and no others"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    plan().save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(document | changes))
    with pytest.raises(BrokenPlan, match=message):
        PruningPlan.load(tmp_path)


def test_a_line_twice_is_refused(tmp_path: Path):
    plan().save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"cuts": {', '"cuts": {"hidden": {"width": 4, "kept": 3},'))
    with pytest.raises(BrokenPlan, match="the key 'hidden' twice"):
        PruningPlan.load(tmp_path)
