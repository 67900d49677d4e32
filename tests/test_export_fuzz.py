"""Mutated checkpoints and plans: an error of our own class, never a crash and never an output.

Bounded by the number of examples, not by a clock, and derandomised: CI sees the same examples every time. More of them:
PAT_SERVE_FUZZ_EXAMPLES=5000 pytest tests/test_export_fuzz.py
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.shards import read_header
from pat_serve.errors import PatServeError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan, file_sha256
from tests.test_export_parity import random_run
from tests.tiny_models import save_tiny_llama

EXAMPLES = int(os.environ.get("PAT_SERVE_FUZZ_EXAMPLES", "60"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# A position (as a share of the file) and what stands there instead: other bytes, nothing, or something more.
edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just("F32")
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)


def edited(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, added in changes:
        at = int(place * len(content))
        content = content[:at] + added + content[at + removed :]
    return content


def replaced(document: Any, path: list[float], value: Any) -> Any:
    """The document with the value at some node: each number of the path picks a child by its share."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = keys[int(path[0] * len(keys))]
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = replaced(document[key], path[1:], value)
    return copy


paths = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    counts = {"hidden": 48, "layers": 1, "ffn": 96, "kv_groups": 1}
    random_run(folder / "run", save_tiny_llama(folder / "base"), counts=counts, replaced=["model.norm.weight"])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def survives(folder: Path, *, export: bool) -> None:
    """Either it is refused by an error of ours, or what was read of it is still what it was."""
    before = sorted(path.name for path in folder.iterdir())
    refusal = None
    try:
        checkpoint = open_checkpoint(str(folder / "base"))
        for entry in checkpoint.tensors.values():
            assert entry.read().shape == entry.shape
        if export:
            PruningPlan.load(folder / "run")
            export_run(folder / "run", folder / "out", base=str(folder / "base"), parity=False)
    except PatServeError as error:
        refusal = error
    if refusal is not None:
        assert refusal.fix
        assert sorted(path.name for path in folder.iterdir()) == before
    shutil.rmtree(folder / "out", ignore_errors=True)


@bounded
@given(changes=edits)
def test_bytes_of_a_shard(changes: list[tuple[float, int, bytes]], folder: Path, made: Path):
    """The header and a little of the data: most of a shard's bytes are numbers, which may be anything."""
    whole = (made / "base/model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    (folder / "base/model.safetensors").write_bytes(edited(whole[:length], changes) + whole[length:])
    survives(folder, export=False)


@bounded
@given(path=paths, value=values)
def test_values_in_a_header(path: list[float], value: Any, folder: Path, made: Path):
    whole = (made / "base/model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.dumps(replaced(json.loads(whole[8 : 8 + length]), path, value)).encode()
    target = folder / "base/model.safetensors"
    target.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    survives(folder, export=False)


@bounded
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_shard(content: bytes, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refusal = None
    try:
        read_header(path)
    except PatServeError as error:
        refusal = error
    # By chance 200 bytes are a file of no tensors: b"\2" + 7 zeros + b"{}".
    assert refusal is None or str(path) in str(refusal)


@bounded
@given(path=paths, value=values)
def test_values_in_a_config(path: list[float], value: Any, folder: Path, made: Path):
    config = json.loads((made / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(replaced(config, path, value)))
    survives(folder, export=False)


@bounded
@given(changes=edits)
def test_bytes_of_a_plan(changes: list[tuple[float, int, bytes]], folder: Path, made: Path):
    (folder / "run/plan.json").write_bytes(edited((made / "run/plan.json").read_bytes(), changes))
    survives(folder, export=True)


@bounded
@given(path=paths, value=values)
def test_values_in_a_plan(path: list[float], value: Any, folder: Path, made: Path):
    document = json.loads((made / "run/plan.json").read_text())
    (folder / "run/plan.json").write_text(json.dumps(replaced(document, path, value)))
    survives(folder, export=True)


@bounded
@given(path=paths, value=values)
def test_values_in_the_header_of_a_plan(path: list[float], value: Any, folder: Path, made: Path):
    """The plan has the hash of the changed arrays, as by somebody who knows how plans are made."""
    whole = (made / "run/plan.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.dumps(replaced(json.loads(whole[8 : 8 + length]), path, value)).encode()
    arrays = folder / "run/plan.safetensors"
    arrays.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    document = json.loads((made / "run/plan.json").read_text())
    (folder / "run/plan.json").write_text(json.dumps(document | {"arrays_sha256": file_sha256(arrays)}))
    survives(folder, export=True)


@bounded
@given(path=paths, value=values)
def test_values_in_an_adapter_config(path: list[float], value: Any, folder: Path, made: Path):
    config = folder / "run/adapter/adapter_config.json"
    config.write_text(json.dumps(replaced(json.loads((made / "run/adapter" / config.name).read_text()), path, value)))
    document = json.loads((made / "run/plan.json").read_text())
    document["adapter"][config.name] = file_sha256(config)
    (folder / "run/plan.json").write_text(json.dumps(document))
    survives(folder, export=True)
