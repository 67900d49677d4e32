"""Replaced weights of a run: written in files, read by name, and refused where they are not the base's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import BrokenPlan
from pat_serve.run.replaced import read_replaced, write_replaced

UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))


def test_they_come_back_from_as_many_files_as_it_takes(tiny_base: Path, tmp_path: Path):
    base = open_checkpoint(str(tiny_base))
    tensors = {name: torch.randn(base.tensors[name].shape) for name in (UP, DOWN)}
    weights = write_replaced(tmp_path, tensors.items(), file_bytes=1)
    assert list(weights) == ["weights-00001.safetensors", "weights-00002.safetensors"]
    found = read_replaced(tmp_path, weights, base)
    assert set(found) == set(tensors)
    assert all(found[name].read().equal(tensor) for name, tensor in tensors.items())
    assert len(write_replaced(tmp_path, tensors.items())) == 1


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.9.mlp.up_proj.weight", (128, 64), "a tensor of the base, found 'model.layers.9"),
        (UP, (64, 64), r"of shape \(128, 64\), the base's, found \(64, 64\)"),
    ],
)
def test_what_the_base_has_not_is_refused(
    name: str, shape: tuple[int, ...], message: str, tiny_base: Path, tmp_path: Path
):
    weights = write_replaced(tmp_path, [(name, torch.zeros(shape))])
    with pytest.raises(BrokenPlan, match=message):
        read_replaced(tmp_path, weights, open_checkpoint(str(tiny_base)))


def test_other_files_are_refused(tiny_base: Path, tmp_path: Path):
    base = open_checkpoint(str(tiny_base))
    (name,) = write_replaced(tmp_path, [(UP, torch.zeros(base.tensors[UP].shape))]).items()
    with pytest.raises(BrokenPlan, match="another content"):
        read_replaced(tmp_path, {name[0]: "0" * 64}, base)
    with pytest.raises(BrokenPlan, match="no such file"):
        read_replaced(tmp_path, {"other.safetensors": name[1]}, base)
    with pytest.raises(BrokenPlan, match=r"names of files in weights/, found '\.\./plan.json'"):
        read_replaced(tmp_path, {"../plan.json": name[1]}, base)
    (tmp_path / "weights/twice.safetensors").write_bytes((tmp_path / "weights" / name[0]).read_bytes())
    with pytest.raises(BrokenPlan, match="once, found another one in weights-00001"):
        read_replaced(tmp_path, dict([name, ("twice.safetensors", name[1])]), base)
