"""The bounded queue, and what a folder may hold that is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import BrokenCheckpoint, MissingModel, UnsupportedModel
from pat_serve.export.exporter import export_run
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.engine.serve import parse_serve_arguments
from pat_serve.server.http.admission import Admission
from pat_serve.server.http.errors import HttpError
from pat_serve.server.start.trusted_model import check_trusted
from pat_serve.server.start.whole_model import check_tokenizer, check_weights, check_whole_models


def refused(admission: Admission, key: str, sequences: int) -> HttpError:
    with pytest.raises(HttpError) as caught, admission.admit(key, sequences):
        pass
    return caught.value


def test_capacity_is_of_sequences_and_comes_back() -> None:
    admission = Admission(capacity=4)
    with admission.admit("a", 3):
        error = refused(admission, "b", 2)
        assert (error.status, error.kind, error.headers["Retry-After"]) == (503, "overloaded", "1")
        with admission.admit("b", 1):
            assert (admission.sequences, admission.requests) == (4, 2)
    with pytest.raises(RuntimeError), admission.admit("a", 4):
        raise RuntimeError
    assert (admission.sequences, admission.requests) == (0, 0)


def test_what_never_fits_is_a_client_error() -> None:
    assert refused(Admission(capacity=4), "a", 5).status == 400


def test_a_request_that_turns_out_larger_takes_more_places() -> None:
    admission = Admission(capacity=4)
    told: list[int] = []
    admission.changed = lambda: told.append(admission.sequences)
    with admission.admit("a", 1):
        for sequences, status in ((4, 400), (3, 503)):
            with admission.admit("b", 1), pytest.raises(HttpError) as caught, admission.more(sequences):
                pass
            assert caught.value.status == status
        with admission.more(3):
            assert refused(admission, "b", 1).kind == "overloaded"
        with pytest.raises(RuntimeError), admission.more(3):
            raise RuntimeError
        assert admission.sequences == 1
    assert max(told) == 4
    assert told[-1] == 0


def test_each_key_has_its_own_bound() -> None:
    admission = Admission(capacity=9, per_key=1)
    with admission.admit("a", 1):
        error = refused(admission, "a", 1)
        assert (error.status, error.headers["Retry-After"]) == (429, "1")
        with admission.admit("b", 1):
            pass
    with admission.admit("a", 1):
        pass


def test_a_stopping_server_takes_nothing_new() -> None:
    admission = Admission(capacity=4)
    with admission.admit("a", 1):
        admission.draining = True
        error = refused(admission, "a", 1)
    assert (error.status, error.kind) == (503, "stopping")
    assert "Retry-After" in error.headers


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedModel, match=f"{name}, a pickle"):
        check_trusted("m", tmp_path)
    # Nothing opens a pickle beside safetensors.
    (tmp_path / "model.safetensors").touch()
    check_trusted("m", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    check_trusted("m", tmp_path)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoConfig": "configuration_evil.Config"}}))
    with pytest.raises(UnsupportedModel, match=f"auto_map in {name}"):
        check_trusted("m", tmp_path)


@pytest.fixture
def whole(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    check_weights(folder)
    check_tokenizer(folder)
    return folder


def test_a_cut_off_weight_file_is_told_before_the_engine_starts(whole: Path) -> None:
    shard = whole / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(BrokenCheckpoint, match=r"model.safetensors: expected a whole safetensors file"):
        check_weights(whole)


@pytest.mark.parametrize("name", ["model [v2]", "what?", "a*b"])
def test_a_folder_that_vllm_would_take_for_a_pattern(
    name: str, whole: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Everything but vLLM reads it; a link of another name is enough."""
    odd = whole.rename(tmp_path / name)
    told = r"expected a path without \*, \? and \[, which vLLM takes for a pattern"
    with pytest.raises(UnsupportedModel, match=told):
        check_weights(odd)
    with pytest.raises(UnsupportedModel, match=told):
        resolve(str(odd), flag="--candidate", load_format="auto", layers=None, scratch=tmp_path)
    with pytest.raises(UnsupportedModel, match=told):
        export_run(finished_run, odd / "out", scorer=lambda _: pytest.fail("asked vLLM"))
    (tmp_path / "link").symlink_to(odd)
    check_weights(tmp_path / "link")
    assert open_checkpoint(str(odd)).num_layers == 2


@pytest.fixture
def sharded(whole: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(whole)
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole, max_shard_size="100KB")
    assert len(list(whole.glob("*.safetensors"))) > 1
    check_weights(whole)
    return whole


def test_a_shard_that_the_index_names_is_missed(sharded: Path) -> None:
    min(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(BrokenCheckpoint, match=r"index.json: expected the shard"):
        check_weights(sharded)


def test_files_that_vllm_does_not_open_may_be_anything(sharded: Path) -> None:
    for name in ("model.safetensors", "._model.safetensors"):
        (sharded / name).write_bytes(b"left behind")
    check_weights(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"model/model.safetensors: expected a whole"):
        check_weights(sharded)


def test_an_index_that_vllm_can_read_is_taken(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weights = json.dumps(json.loads(index.read_text())["weight_map"])
    index.write_text(f'{{"metadata": {{"size": NaN, "size": 1}}, "weight_map": {weights}}}')
    check_weights(sharded)
    for text in ("{", "[" * 100_000, "{}"):
        index.write_text(text)
        with pytest.raises(BrokenCheckpoint, match=r"index.json: expected a safetensors index"):
            check_weights(sharded)


def test_a_folder_without_weights_is_told(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    with pytest.raises(MissingModel, match="weights in safetensors files, found none"):
        check_weights(whole)
    (whole / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(BrokenCheckpoint, match="a whole safetensors file"):
        check_weights(whole)


def test_a_folder_without_a_tokenizer_needs_another(whole: Path) -> None:
    (whole / "tokenizer.json").unlink()
    with pytest.raises(MissingModel, match="a folder with a tokenizer"):
        check_tokenizer(whole)
    (whole / "tokenizer.model.v3").touch()
    check_tokenizer(whole)


def test_a_tokenizer_that_is_no_json_is_named(whole: Path) -> None:
    (whole / "tokenizer.json").write_text('{"a": 1, "a": 2}')
    check_tokenizer(whole)
    for text in ("{", "[" * 100_000):
        (whole / "tokenizer.json").write_text(text)
        with pytest.raises(BrokenCheckpoint, match=r"tokenizer.json: expected a tokenizer's JSON"):
            check_tokenizer(whole)


@pytest.mark.parametrize(
    "flags",
    [["--tokenizer", "elsewhere"], ["--skip_tokenizer_init"], ["--skip-tok"], ["--tokenizer_mode=mistral"]],
)
def test_vllms_flags_say_what_is_read(flags: list[str], whole: Path) -> None:
    (whole / "tokenizer.json").unlink()

    def check(*given: str, model: str = str(whole), baseline: str | None = None, draft: str | None = None) -> None:
        args = parse_serve_arguments(["--model", model, "--load-format", "safetensors", *given])
        check_whole_models(args, model, baseline=baseline, draft=draft)

    with pytest.raises(MissingModel, match="a tokenizer"):
        check()
    check(*flags)
    check(model="hub/model", draft=str(whole))
    # The baseline's engine takes no tokenizer from elsewhere.
    if flags[0] == "--tokenizer":
        with pytest.raises(MissingModel, match="a tokenizer"):
            check(*flags, model="hub/model", baseline=str(whole))
    (whole / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(BrokenCheckpoint):
        check(model="hub/model", draft=str(whole))
    check(*flags, "--load-format", "dummy")
