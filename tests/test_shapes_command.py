"""pat-shapes: the table, the choice by speed, what it reads, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pat_serve.cli.shapes import shapes
from pat_serve.errors import PatServeError
from pat_serve.server.bench.model_source import shipped_shapes
from tests.gguf_files import write_gguf
from tests.speedup_records import depths_result, speedup_result
from tests.tiny_models import save_tiny_llama, tiny_config

app = typer.Typer()
app.command()(shapes)

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def answer(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None, done.exception
    return done.output


def document(*arguments: object) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(answer(*arguments, "--json"))
    return read


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMOLLM2))
    return path


def test_a_table_of_a_shipped_shape() -> None:
    text = answer("llama2-7b", "--ratio", "0.25", "--at", "1x128,32x2048", "--shape", "layers=28,hidden=3840,ffn=9472")
    lines = {tuple(line.split()[1:2]): line.split() for line in text.splitlines() if line[:1].isdigit()}
    assert lines[("hidden=3072",)][2:] == ["5.05", "B", "25.0%", "9978.1", "512.0", "1.331", "1.075", "1.332", "1.316"]
    assert lines[("hidden=3840,layers=28,ffn=9472",)][-4:-2] == ["1.336", "1.191"]
    assert "written as MistralForCausalLM" in text
    assert "so small" not in text, "a layer of 7B is large"


def test_a_tied_base_is_shown_tied_and_untied(smollm2: Path) -> None:
    found = document(smollm2, "--at", "1x128")
    streams = [shape for shape in found["shapes"] if list(shape["counts"]) == ["hidden"]]
    assert [(shape["counts"]["hidden"], shape["unties"]) for shape in streams] == [(432, False), (360, True)]
    assert all(abs(shape["share"] - 0.25) < 0.01 for shape in streams)
    assert any("fixed work" in remark for remark in found["remarks"])
    assert any(remark.startswith("kv_groups: 6.6%") for remark in found["remarks"])
    assert document(smollm2.parent, "--at", "1x128") == found, "its folder says the same"


def test_the_smallest_cut_that_is_fast_enough(smollm2: Path) -> None:
    found = document(smollm2, "--speedup", "1.33", "--at", "8x1024")
    best = found["shapes"][found["picked"]]
    assert best["counts"] == {"layers": 28, "ffn": 1408, "kv_groups": 2}
    fast = [shape for shape in found["shapes"] if shape["loads"][0]["decode_ceiling"] >= 1.33]
    assert len(fast) == len(found["shapes"])
    assert best["parameters"] == max(shape["parameters"] for shape in fast)


def test_shapes_that_cannot_be_split_say_so(smollm2: Path) -> None:
    found = document("llama2-7b", "--tp", "8", "--at", "1x128")
    for shape in found["shapes"]:
        split = shape["counts"].get("kv_groups", 32) % 8 == 0 and shape["counts"].get("ffn", 11008) % 8 == 0
        assert split == (not shape["obstacles"]), shape
    # Nine heads are never split in two.
    assert all(
        "--tp 2: 9 heads" in str(shape["obstacles"])
        for shape in document(smollm2, "--tp", "2", "--shape", "layers=24", "--at", "1x1")["shapes"]
    )


def test_a_gguf_file_says_what_its_model_does(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", "Q8_0")
    arguments = ("--shape", "layers=1", "--at", "1x16")
    assert document(file, *arguments) == document(base, *arguments)


def test_a_probe_stands_beside_the_ceilings(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config().to_dict()))
    found = document(path, "--shape", "layers=1", "--at", "1x16", "--probe", "--dtype", "float32")
    assert found["costs"]["times"] == 9
    assert "this machine, float32" in found["costs"]["source"]
    [shape] = found["shapes"]
    assert shape["loads"][0]["decode_speedup"] >= 1
    assert found["base"]["loads"][0]["decode_speedup"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "8"], "--at: expected requests x tokens"),
        (["--at", "0x128"], "--at: expected requests x tokens"),
        (["--tp", "2,x"], "--tp: expected degrees"),
        (["--tp", "0"], "--tp: expected degrees"),
        (["--ratio", "0.7"], r"--ratio: expected a share of all parameters to cut, in \(0, 0.6\]"),
        (["--ratio", "nan"], "--ratio: expected a share"),
        (["--ratio", "0.2", "--speedup", "1.2"], "--ratio: expected --ratio or --speedup, found both"),
        (["--probe", "--results", "x.json"], "--probe: expected --probe or --results, found both"),
        (["--results", "missing.json"], "missing.json"),
        (["--speedup", "1"], "--speedup: expected a number above 1"),
        (["--speedup", "nan"], "--speedup: expected a number above 1"),
        (["--speedup", "50"], "found 3.* at most"),
        (["--dtype", "int8"], "--dtype: expected auto, float32"),
        (["--shape", "layers=31"], "layers between 1 and the base's 30, found 31"),
        (["--shape", "heads=3"], "axes among hidden, layers, ffn, kv_groups"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], message: str, smollm2: Path) -> None:
    error = CliRunner().invoke(app, [str(smollm2), *arguments]).exception
    assert isinstance(error, PatServeError)
    assert error.exit_code == 2
    assert len(str(error).splitlines()) == 1
    assert re.search(message, str(error)), error


def test_a_model_that_is_none_names_all_that_can_be_given(tmp_path: Path) -> None:
    error = CliRunner().invoke(app, [str(tmp_path / "none.gguf")]).exception
    assert f"a shipped shape ({', '.join(shipped_shapes())})" in str(error)
    broken = tmp_path / "config.json"
    broken.write_text("[1]")
    assert "a JSON object" in str(CliRunner().invoke(app, [str(broken)]).exception)
    broken.write_text(json.dumps({**SMOLLM2, "model_type": "gpt2"}))
    assert "model_type" in str(CliRunner().invoke(app, [str(broken)]).exception)


def test_recorded_times_of_engines_are_taken(tmp_path: Path) -> None:
    deep, flat = tmp_path / "deep.json", tmp_path / "flat.json"
    deep.write_text(depths_result().model_dump_json())
    flat.write_text(speedup_result().model_dump_json())
    found = document("llama2-7b", "--shape", "layers=24", "--at", "1x128", "--results", deep)
    assert found["costs"]["times"] == 8
    assert "vLLM's times in deep.json" in found["costs"]["source"]
    arguments = ["llama2-7b", "--results", str(flat)]
    error = CliRunner().invoke(app, arguments).exception
    assert "times of prefill and decode, of two depths" in str(error)
    error = CliRunner().invoke(app, [*arguments[:1], "--dtype", "bfloat16", "--results", str(deep)]).exception
    assert "--dtype: expected float32, which the results are in" in str(error)
