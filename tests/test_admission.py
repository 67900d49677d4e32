"""The bounded queue, and what a folder may hold that is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pat_serve.errors import BrokenCheckpoint, MissingModel, UnsupportedModel
from pat_serve.server.http.admission import Admission
from pat_serve.server.http.errors import HttpError
from pat_serve.server.trusted_model import check_trusted
from pat_serve.server.whole_model import check_whole


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
    check_whole(str(folder), folder)
    return folder


def test_a_cut_off_weight_file_is_told_before_the_engine_starts(whole: Path) -> None:
    shard = whole / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(
        BrokenCheckpoint, match=r"model.safetensors: expected a whole safetensors file, found 5000 bytes"
    ):
        check_whole(str(whole), whole)


def test_a_folder_without_a_tokenizer_needs_another(whole: Path) -> None:
    (whole / "tokenizer.json").unlink()
    with pytest.raises(MissingModel, match="a folder with a tokenizer"):
        check_whole(str(whole), whole)
    check_whole(str(whole), whole, ["--tokenizer=elsewhere"])
    check_whole("hub/model", whole)


def test_a_tokenizer_that_is_no_json_is_named(whole: Path) -> None:
    (whole / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer.json: expected a tokenizer's JSON"):
        check_whole(str(whole), whole)
