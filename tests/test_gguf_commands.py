"""A GGUF file in the place of a folder: trained, exported, evaluated, benchmarked and served under its own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.locate import locate, stock_path
from pat_serve.errors import BrokenPlan, ChangedInput, MissingModel
from pat_serve.evaluation.backends import BackendSettings
from pat_serve.evaluation.subject import Subject
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import file_sha256
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.cluster.settings import read_settings
from pat_serve.server.start.settings import ServeSettings, serve_arguments, with_stock_folders
from pat_serve.training.api import PatConfig, apply_pat
from pat_serve.training.data import load_tokenizer
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.gguf_files import write_gguf
from tests.test_recipe_defaults import DEFAULTS
from tests.tiny_models import save_tiny_llama

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    base = save_tiny_llama(folder / "base", seed=11, tie_word_embeddings=True)
    (folder / "model").mkdir()
    return write_gguf(base, folder / "model/small.gguf", "Q8_0", change=lambda writer: writer.add_license("apache-2.0"))


@pytest.fixture(scope="module")
def run(file: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    start(tiny_recipe(file, rows, **DEFAULTS, max_steps=2), run)
    return run


def test_an_export_says_which_file_its_base_was(file: Path, run: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "out").out
    record = json.loads((out / "pat_export.json").read_text())
    assert (record["base"]["source"], record["base"]["gguf_sha256"]) == ("small.gguf", file_sha256(file))
    card = (out / "README.md").read_text()
    assert f"Base: small.gguf, SHA-256 `{file_sha256(file)}`." in card
    assert "license: apache-2.0" in card
    # The folder is a plain one: no trace of the GGUF file is left.
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "pat_gguf.json").exists()


def test_an_export_finds_its_base_again(file: Path, run: Path, tmp_path: Path):
    # A second reading gives the same bytes.
    shutil.rmtree(locate(str(file)))
    export_run(run, tmp_path / "first", parity=False)
    moved = file.with_name("moved.gguf")
    file.rename(moved)
    try:
        with pytest.raises(MissingModel, match=r"small\.gguf: expected the base model.* say where with --base"):
            export_run(run, tmp_path / "second", parity=False)
        export_run(run, tmp_path / "second", base=str(moved), parity=False)
    finally:
        moved.rename(file)
    other = write_gguf(
        save_tiny_llama(tmp_path / "base", seed=12, tie_word_embeddings=True), tmp_path / "o.gguf", "Q8_0"
    )
    with pytest.raises(BrokenPlan, match="the file of the training"):
        export_run(run, tmp_path / "third", base=str(other), parity=False)


def test_a_model_that_transformers_has_read_is_taken_in_a_notebook(file: Path):
    config = PatConfig(preset="paper", ratio=0.25)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    adapted = apply_pat(model, config)
    assert adapted.pat.checkpoint.folder == locate(str(file))
    # In float32 it has digits that the folder has not.
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with pytest.raises(ChangedInput, match=r"Load the model with dtype=torch\.bfloat16"):
        apply_pat(model, config)


def test_pat_eval_measures_it(file: Path):
    examples = [{"input_ids": [0, 5, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]}]
    figures = []
    for source in (str(file), stock_path(str(file))):
        settings = BackendSettings(backend="hf", dtype="float32", batch_size=1, tokenizer=None)
        subject = Subject("it", source, settings, load_tokenizer)
        figures.append(subject.nll(examples, 1))
        assert subject.describe().hidden_size == 64
    assert figures[0] == figures[1]


def test_pat_bench_takes_it(file: Path, tmp_path: Path):
    folder = locate(str(file))
    for name in (str(file), str(file.parent)):
        source = resolve(name, flag="--model", load_format="auto", layers=None, scratch=tmp_path)
        assert (source.name, source.path, source.on_disk, source.shape.layers) == (name, str(folder), True, 2)
    cut = resolve(str(file), flag="--model", load_format="dummy", layers=1, scratch=tmp_path)
    assert (cut.path, cut.shape.layers) == (str(tmp_path), 1)


def test_pat_serve_loads_the_folder_and_keeps_the_name(file: Path):
    settings = ServeSettings(
        model=str(file), host="127.0.0.1", port=8000, dtype="auto", max_model_len=None, kv_cache_gib=1, compiled=False,
        draft=str(file), baseline=str(file),
    )  # fmt: skip
    folder = str(locate(str(file)))
    stock = with_stock_folders(settings)
    assert (stock.model, stock.draft, stock.baseline) == (folder, folder, str(file))
    arguments = serve_arguments(stock, on_cpu=False)
    assert arguments[:2] == ["--model", folder]
    assert arguments[arguments.index("--served-model-name") + 1] == str(file)
    # The user's own name comes after it, and wins.
    named = with_stock_folders(ServeSettings(**vars(settings) | {"vllm_flags": ("--served-model-name", "mine")}))
    assert serve_arguments(named, on_cpu=False)[-2:] == ["--served-model-name", "mine"]
    # A folder is left as it is.
    plain = ServeSettings(**vars(settings) | {"model": folder, "draft": None, "baseline": None})
    assert with_stock_folders(plain) == plain


def test_a_link_of_the_hubs_cache_keeps_its_name(file: Path, rows: Path, tmp_path: Path):
    blob, link = tmp_path / "blobs/9f8e7d", tmp_path / "snapshots/main/linked.gguf"
    blob.parent.mkdir()
    link.parent.mkdir(parents=True)
    shutil.copy(file, blob)
    link.symlink_to(blob)
    start(tiny_recipe(link, rows, **DEFAULTS, max_steps=1), tmp_path / "run")
    record = json.loads((tmp_path / "run/plan.json").read_text())
    assert record["base"]["source"] == str(link)
    export_run(tmp_path / "run", tmp_path / "out", parity=False)


def test_a_replica_reads_it_on_its_own_node(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(file.parent)
    assert read_settings({"model": file.name}).model == str(file)
