"""Checkpoints and plans that lie, or that would run code, or that lead out of their folder: refused, and no output."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pat_serve.cut.hybrid import HybridFold
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, PatServeError, UnsupportedModel, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan, file_sha256
from tests.test_export_parity import random_run
from tests.tiny_models import save_tiny_llama

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a run."""
    folder = tmp_path_factory.mktemp("made")
    random_run(folder / "run", save_tiny_llama(folder / "base"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def refuse(folder: Path, error: type[PatServeError], message: str, **settings: object) -> None:
    """The export names the fault and leaves nothing, not even a hidden folder."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        export_run(folder / "run", folder / "out", base=str(folder / "base"), parity=False, **settings)
    assert type(caught.value) is error
    assert caught.value.fix
    assert sorted(folder.iterdir()) == before


def header_of(shard: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(shard: Path, header: object, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def split(base: Path) -> None:
    """Two shards and an index in place of the single file."""
    tensors = load_file(base / SHARD)
    (base / SHARD).unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, base / file)
    weights = {name: file for file, members in files.items() for name in members}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def edit_index(base: Path, change: Callable[[dict[str, str]], None]) -> None:
    document = json.loads((base / INDEX).read_text())
    change(document["weight_map"])
    (base / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_call_for_code(name: str, folder: Path):
    path = folder / "base" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling.Model"}}))
    refuse(folder, UnsupportedModel, f"code of its own .auto_map in {name}")


@pytest.mark.parametrize("name", ["modeling_llama.py", "kernel.so"])
def test_code_beside_the_weights(name: str, folder: Path):
    (folder / "base" / name).write_text("raise SystemExit('it ran')")
    refuse(folder, UnsupportedModel, f"code of its own .{name}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickles(name: str, folder: Path):
    (folder / "base" / SHARD).rename(folder / "base" / name)
    refuse(folder, UnsupportedModel, "pickles are never loaded")


def test_pickles_beside_safetensors_are_neither_read_nor_carried(folder: Path):
    (folder / "base/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    out = export_run(folder / "run", folder / "out", base=str(folder / "base"), parity=False).out
    assert not list(out.glob("*.bin"))


def test_named_chat_templates_are_carried(folder: Path):
    """transformers saves a tokenizer with several so: one by default, the others in a folder of their own."""
    base = folder / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates/tool_use.jinja").is_file()
    out = export_run(folder / "run", folder / "out", base=str(base), parity=False).out
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
def test_a_link_that_leads_out(name: str, folder: Path):
    outside = folder / "outside"
    (folder / "base" / name).rename(outside)
    (folder / "base" / name).symlink_to(outside)
    refuse(folder, BrokenCheckpoint, "in the model's own folder, found a link")


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.md", "tokenizer.secret"])
def test_a_carried_file_that_is_a_link_out(name: str, folder: Path):
    """The link's target would be published with the model: a base could so ask for somebody's key."""
    (folder / "key").write_text("secret")
    (folder / "base" / name).symlink_to(folder / "key")
    refuse(folder, BrokenCheckpoint, "in the model's own folder, found a link")


def test_the_links_of_a_hub_snapshot_are_followed(folder: Path):
    """The hub's cache keeps files under their hashes and links them into a snapshot."""
    snapshot = folder / "models--a--b/snapshots" / ("0" * 40)
    blobs = folder / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "base").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    export_run(folder / "run", folder / "out", base=str(snapshot), parity=False)


@pytest.mark.parametrize("name", ["../model-00001-of-00002.safetensors", "/etc/passwd", "gone.safetensors", ""])
def test_an_index_that_leads_out(name: str, folder: Path):
    split(folder / "base")
    shutil.copy(folder / "base/model-00001-of-00002.safetensors", folder)
    edit_index(folder / "base", lambda weights: weights.update({EMBEDDING: name}))
    refuse(folder, BrokenCheckpoint, "beside it, found no such file")


def test_an_index_that_names_another_shard(folder: Path):
    split(folder / "base")
    edit_index(
        folder / "base", lambda weights: weights.update(dict(zip(weights, reversed(weights.values()), strict=True)))
    )
    refuse(folder, BrokenCheckpoint, r"index\.json: expected the tensor .* in model-0000. *.*found it in model-0000")


@pytest.mark.parametrize("change", ["forgets", "invents"])
def test_an_index_and_shards_that_disagree(change: str, folder: Path):
    split(folder / "base")
    edit_index(
        folder / "base",
        lambda weights: weights.pop(EMBEDDING) if change == "forgets" else weights.update(x=weights[EMBEDDING]),
    )
    refuse(folder, BrokenCheckpoint, "no shard")


def test_a_tensor_in_two_shards(folder: Path):
    split(folder / "base")
    for path in (folder / "base").glob("model-*"):
        save_file(load_file(path) | {EMBEDDING: torch.zeros(384, 64)}, path)
    refuse(folder, BrokenCheckpoint, "the tensor model.embed_tokens.weight once")


def test_an_index_beside_a_single_file(folder: Path):
    """transformers would read the one and others the other."""
    whole = (folder / "base" / SHARD).read_bytes()
    split(folder / "base")
    (folder / "base" / SHARD).write_bytes(whole)
    refuse(folder, BrokenCheckpoint, "found both")


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 1, 0])
def test_a_header_that_lies_about_its_length(length: int, folder: Path):
    shard = folder / "base" / SHARD
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    refuse(folder, BrokenCheckpoint, f"a header of {length} bytes")


def test_an_oversized_header(folder: Path):
    """The header is as long as it says, and still longer than any model's: it is not parsed."""
    shard = folder / "base" / SHARD
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**33)  # sparse
    refuse(folder, BrokenCheckpoint, f"a header of {2**32} bytes")


HEADERS: dict[str, tuple[Callable[[dict[str, dict[str, object]]], None], str]] = {
    "overlapping": (lambda h: h[EMBEDDING].update(data_offsets=[0, 98304]), "overlapping|a gap"),
    "a wrong size": (lambda h: h[EMBEDDING].update(shape=[384, 65]), "99840 bytes for .*found 98304 bytes"),
    "a negative offset": (lambda h: h[EMBEDDING].update(data_offsets=[-98304, 0]), "dtype, shape and data_offsets"),
    "a negative shape": (lambda h: h[EMBEDDING].update(shape=[-384, -64]), "dtype, shape and data_offsets"),
    "a fraction": (lambda h: h[EMBEDDING].update(shape=[384.0, 64]), "dtype, shape and data_offsets"),
    "true": (lambda h: h[EMBEDDING].update(shape=[True, 64]), "dtype, shape and data_offsets"),
    "a giant": (lambda h: h[EMBEDDING].update(shape=[2**62, 2**62]), "bytes for"),
    "another dtype": (lambda h: h[EMBEDDING].update(dtype="I8"), "in F64, F32, F16, BF16"),
    "no dtype": (lambda h: h[EMBEDDING].pop("dtype"), "dtype, shape and data_offsets"),
    "one more field": (lambda h: h[EMBEDDING].update(code="x"), "dtype, shape and data_offsets"),
    "no object": (lambda h: h.update({EMBEDDING: 5}), "dtype, shape and data_offsets"),
    "the same bytes twice": (lambda h: h.update(twin=dict(h[EMBEDDING])), "overlapping"),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_lies(damage: str, folder: Path):
    change, message = HEADERS[damage]
    shard = folder / "base" / SHARD
    header, data = header_of(shard)
    change(header)
    write_header(shard, header, data)
    refuse(folder, BrokenCheckpoint, message)


def test_a_gap_between_tensors(folder: Path):
    """Bytes that belong to no tensor could be anything."""
    shard = folder / "base" / SHARD
    header, data = header_of(shard)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 16 for offset in entry["data_offsets"]]
    write_header(shard, header, b"\0" * 16 + data)
    refuse(folder, BrokenCheckpoint, "a gap")


@pytest.mark.parametrize("extra", [-4, 4])
def test_a_shard_of_another_length(extra: int, folder: Path):
    shard = folder / "base" / SHARD
    os.truncate(shard, shard.stat().st_size + extra)
    refuse(folder, BrokenCheckpoint, "truncated or damaged")


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX])
def test_a_key_twice(name: str, folder: Path):
    """Parsers differ in which one they take."""
    base = folder / "base"
    if name == SHARD:
        header, data = header_of(base / SHARD)
        line = json.dumps({EMBEDDING: header[EMBEDDING]}).encode()
        write_header(base / SHARD, line[:-1] + b"," + json.dumps(header).encode()[1:], data)
    elif name == INDEX:
        split(base)
        text = (base / INDEX).read_text()
        (base / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{EMBEDDING}": "x", '))
    else:
        path = base / name
        path.write_text('{"hidden_size": 32, ' + path.read_text()[1:])
    refuse(folder, BrokenCheckpoint, "twice")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_size", True),
        ("hidden_size", 2**40),
        ("num_hidden_layers", 2**30),
        ("num_key_value_heads", "2"),
        ("head_dim", -32),
        ("rms_norm_eps", -1e-5),
        ("tie_word_embeddings", "no"),
        ("model_type", ["llama"]),
    ],
)
def test_a_config_that_lies(setting: str, value: object, folder: Path):
    path = folder / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    error = UnsupportedModel if setting == "model_type" else BrokenCheckpoint
    refuse(folder, error, "layers" if value == 2**30 else setting)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"rms_norm_eps": NaN}', "\xff"])
def test_a_config_that_is_no_json(text: str, folder: Path):
    (folder / "base/config.json").write_bytes(text.encode("latin-1"))
    refuse(folder, BrokenCheckpoint, r"config\.json: expected a JSON object")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [EMBEDDING, "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_no_number(value: float, name: str, tmp_path: Path):
    """Written into the base before the run was made, so that every hash fits; the last number of its tensor."""
    base = save_tiny_llama(tmp_path / "base")
    tensors = load_file(base / SHARD)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, base / SHARD, {"format": "pt"})
    random_run(tmp_path / "run", base)
    refuse(tmp_path, BrokenCheckpoint, f"finite numbers in {name}")


def test_a_dtype_that_overflows(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    tensors = load_file(base / SHARD)
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, base / SHARD, {"format": "pt"})
    random_run(tmp_path / "run", base)
    refuse(tmp_path, UsageError, "float16, which ends at 6.55e", dtype="float16")


def edit_plan(run: Path, **changes: object) -> None:
    replace(PruningPlan.load(run), **changes).save(run)


@pytest.mark.parametrize("part", ["l0_RD", "l1_DR", "scale_D"])
def test_a_fold_that_is_no_number(part: str, folder: Path):
    plan = PruningPlan.load(folder / "run")
    folds = {
        site: HybridFold(**{key: value.clone() for key, value in vars(fold).items()})
        for site, fold in plan.folds.items()
    }
    getattr(folds["model.layers.0.mlp.down_proj"], part).view(-1)[3] = float("nan")
    edit_plan(folder / "run", folds=folds)
    refuse(folder, BrokenPlan, r"finite numbers in folds\.model\.layers\.0\.mlp\.down_proj")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_is_no_number(half: str, folder: Path):
    path = folder / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if half in name)[0, 0] = float("inf")
    save_file(tensors, path)
    edit_plan(folder / "run", adapter=PruningPlan.load(folder / "run").adapter | {path.name: file_sha256(path)})
    refuse(folder, BrokenPlan, f"finite numbers in .*{half}")


def test_a_rotation_that_is_none(folder: Path):
    edit_plan(folder / "run", rotation=torch.eye(64) * 1.1)
    refuse(folder, BrokenPlan, "an orthogonal rotation")


def test_operators_of_another_width(folder: Path):
    plan = PruningPlan.load(folder / "run")
    narrow = {
        site: HybridFold(l0_RD=torch.zeros(2, 32), l1_DR=torch.zeros(32, 2), scale_D=torch.ones(32))
        for site in plan.folds
    }
    edit_plan(folder / "run", folds=narrow)
    refuse(folder, BrokenPlan, "width 64 of")


def test_a_plan_that_promises_zeros(folder: Path):
    edit_plan(folder / "run", sparsity={"model.layers.0.mlp.up_proj": "2:4"})
    refuse(folder, BrokenPlan, r"zeros of pattern 2:4 in model\.layers\.0\.mlp\.up_proj, found a group")


@pytest.mark.parametrize("names", [{}, {"config.json": "0" * 64}, {"../run/plan.json": "0" * 64}])
def test_a_plan_that_does_not_say_which_base(names: dict[str, str], folder: Path):
    """Without the hashes any base of the same shape would do."""
    base = PruningPlan.load(folder / "run").base
    edit_plan(folder / "run", base=base.model_copy(update={"sha256": names}))
    refuse(folder, BrokenPlan, "the SHA-256 of all 2 files")


def test_a_plan_that_does_not_say_which_adapter(folder: Path):
    plan = PruningPlan.load(folder / "run")
    edit_plan(folder / "run", adapter={"adapter_config.json": plan.adapter["adapter_config.json"]})
    refuse(folder, BrokenPlan, r"the SHA-256 of adapter_config\.json and adapter_model\.safetensors")


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_alpha": "8"}, {"r": True}, {"use_rslora": 1}])
def test_an_adapter_config_that_lies(change: dict[str, object], folder: Path):
    path = folder / "run/adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    edit_plan(folder / "run", adapter=PruningPlan.load(folder / "run").adapter | {path.name: file_sha256(path)})
    refuse(folder, BrokenPlan, "r as a positive integer")


def test_a_key_twice_in_a_plan(folder: Path):
    path = folder / "run/plan.json"
    path.write_text('{"method": "other", ' + path.read_text()[1:])
    refuse(folder, BrokenPlan, "the key 'method' twice")
