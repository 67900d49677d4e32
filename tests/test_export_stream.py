"""The export in blocks: what comes out does not depend on them, a rotation included, and memory holds little of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.hybrid import HybridFold
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, DiskFull
from pat_serve.export import exporter
from pat_serve.export.exporter import export_run
from pat_serve.export.rewrite import blocks
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.dry_run import dry_run
from pat_serve.export.rewrite.scratch import Scratch
from pat_serve.export.run.adapter import LoraUpdate
from pat_serve.export.run.hashes import hash_files
from pat_serve.export.run.reader import open_run
from pat_serve.run.plan import PruningPlan, file_sha256
from tests.test_export_parity import random_run
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module", params=["plain", "rotated", "rotated and diagonal"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Operators of rank 8, a rotation with them, and a rotation with scales alone, which is cut before it is used."""
    folder = tmp_path_factory.mktemp("stream")
    run = random_run(folder / "run", save_tiny_llama(folder / "base"))
    plan = PruningPlan.load(run)
    if request.param != "plain":
        plan = replace(plan, rotation=torch.linalg.qr(torch.randn(64, 64)).Q.contiguous())
    if request.param == "rotated and diagonal":
        diagonal = {
            site: HybridFold(l0_RD=torch.zeros(0, 64), l1_DR=torch.zeros(64, 0), scale_D=fold.scale_D)
            for site, fold in plan.folds.items()
        }
        plan = replace(plan, folds=diagonal)
    plan.save(run)
    return run


def test_the_blocks_change_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_run(run)
    whole = dict(Rewriting(opened, torch.float32).tensors())
    monkeypatch.setattr(blocks, "_BLOCK_NUMBERS", 700)
    monkeypatch.setattr(blocks, "_PRODUCT_NUMBERS", 1300)
    out = export_run(run, tmp_path / "out", max_shard_bytes=100_000, parity=False).out
    written: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        assert path.stat().st_size < 110_000 or len(load_file(path)) == 1
        written |= load_file(path)
    put_together = dict(Rewriting(opened, torch.float32).tensors())
    assert written.keys() == whole.keys() == put_together.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-5)
        assert torch.equal(written[name], put_together[name]), name


def test_hashes_are_taken_while_the_files_are_written(run: Path, tmp_path: Path):
    done = export_run(run, tmp_path / "out", max_shard_bytes=100_000, parity=False)
    assert len(list(done.out.glob("*.safetensors"))) > 1
    assert done.record["files"] == hash_files(done.out)


def test_another_base_is_noticed_before_anything_has_a_name(run: Path, tmp_path: Path):
    """The base is hashed beside the writing, so a weight may turn out to be another one until the end."""
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenPlan, match=r"model\.safetensors: expected the file of the training"):
        export_run(run, tmp_path / "out", base=str(base), parity=False)
    # A NaN is found by the rewriting too, perhaps earlier; where it comes from says more.
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrokenPlan, match=r"model\.safetensors: expected the file of the training"):
        export_run(run, tmp_path / "out", base=str(base), parity=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_parity_of_what_was_cut_early(run: Path, tmp_path: Path):
    """The gate's wide model shares no rewriting with the blocks."""
    parity = export_run(run, tmp_path / "out").parity
    assert parity is not None
    assert parity.max_abs_over_std < 1e-4


def test_a_norm_that_is_folded_into_others_is_checked_as_well(run: Path, tmp_path: Path):
    opened = open_run(run)
    base = shutil.copytree(opened.base.folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = torch.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    rewriting = Rewriting(replace(opened, base=open_checkpoint(str(base))), torch.float32)
    reader = "model.layers.0.self_attn.q_proj.weight" if opened.plan.rotation is not None else "unused"
    for name in {"model.layers.0.input_layernorm.weight", reader} - {"unused"}:
        with pytest.raises(BrokenCheckpoint, match=r"finite numbers in model\.layers\.0\.input_layernorm\.weight"):
            list(rewriting.blocks(name, Scratch()))


def test_a_plan_that_fits_no_tensor_fails_before_the_first_byte(run: Path, tmp_path: Path):
    opened = open_run(run)
    dry_run(opened, torch.bfloat16)
    short = {name: replace(update, b_OR=update.b_OR[:-1]) for name, update in opened.adapter.items()}
    with pytest.raises(BrokenPlan, match="to come out as"):
        dry_run(replace(opened, adapter=short), torch.bfloat16)


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(exporter, "_SPARE_BYTES", 2**60)
    with pytest.raises(DiskFull, match=r"[GM]B of free space, found"):
        export_run(run, tmp_path / "deep/out", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_one_thread_ends_both(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        "pat_serve.export.rewrite.job.rewrite_tensor", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no more"))
    )
    monkeypatch.setattr(exporter, "dry_run", lambda *_: None)
    with pytest.raises(MemoryError, match="no more"):
        export_run(run, tmp_path / "out", parity=False)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_a_thread_keeps_little_in_memory(run: Path):
    """An embedding or a reader comes in blocks, a residual writer alone is read whole."""
    opened = open_run(run)
    scratch = Scratch()
    taken: list[int] = []
    take = scratch.take
    scratch.take = lambda use, size: (taken.append(size), take(use, size))[1]
    largest = max(entry.size_bytes for entry in opened.base.tensors.values() if entry.shape[0] == 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK_NUMBERS", 256)
        patch.setattr(blocks, "_PRODUCT_NUMBERS", 256)
        rewriting = Rewriting(opened, torch.bfloat16)
        for name in rewriting.shapes:
            for _ in rewriting.blocks(name, scratch):
                pass
    assert max(taken) <= largest


def test_an_update_without_a_tensor_of_its_own(tmp_path: Path):
    """A tied head that stays the embedding: an update of either would change one and not the other."""
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    run = random_run(tmp_path / "run", base)
    plan = PruningPlan.load(run)
    scale = plan.folds["model.embed_tokens"].scale_D.clamp(min=0.5)
    diagonal = HybridFold(l0_RD=torch.zeros(0, 64), l1_DR=torch.zeros(64, 0), scale_D=scale)
    replace(plan, folds={**plan.folds, "model.embed_tokens": diagonal}).save(run)
    opened = open_run(run)
    dry_run(opened, torch.float32)
    vocab = opened.base.tensors["model.embed_tokens.weight"].shape[0]
    update = LoraUpdate(a_RI=torch.randn(4, 64), b_OR=torch.randn(vocab, 4), scaling=1.0)
    for module in ("lm_head", "model.embed_tokens"):
        with pytest.raises(BrokenPlan, match=f"found one of {module}, which is tied"):
            dry_run(replace(opened, adapter={module: update}), torch.float32)


def test_an_adapter_of_another_rank(run: Path, tmp_path: Path):
    """The adapter's scaling would follow the configuration's rank, and differ from the training's."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = copy / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    plan = PruningPlan.load(copy)
    replace(plan, adapter={name: file_sha256(copy / "adapter" / name) for name in plan.adapter}).save(copy)
    with pytest.raises(BrokenPlan, match="expected an update of rank 8, found rank 4"):
        open_run(copy)
