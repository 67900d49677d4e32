"""Every way in which a base's config.json can be bad gets one line that names the file and the setting."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import PatServeError
from tests.test_bad_input import edit_config
from tests.test_stock_class import OPENERS, accept
from tests.tiny_models import save_tiny_family, save_tiny_llama


class Setting(Enum):
    """A value that is none: its repr is the same in every process, as the tests' names must be."""

    GONE = "gone"


GONE = Setting.GONE
ROPE = {"rope_theta": 10_000.0}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    # Sizes.
    "width and heads": ({"hidden_size": 200, "num_attention_heads": 12}, r"The hidden size \(200\) is not a multiple"),
    "a negative size": ({"intermediate_size": -128}, "intermediate_size as a positive integer, found -128"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers as a positive integer, found 0"),
    "a size as text": ({"hidden_size": "64"}, "hidden_size as a positive integer, found '64'"),
    "a size with a point": ({"num_attention_heads": 4.0}, "num_attention_heads as a positive integer, found 4.0"),
    "a size that is true": ({"num_key_value_heads": True}, "num_key_value_heads as a positive integer, found True"),
    "a missing size": ({"vocab_size": GONE}, "vocab_size as a positive integer, found (None|no such entry)"),
    "key-value heads that do not divide": ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads 3, found 4"),
    "no room": ({"max_position_embeddings": -1}, "max_position_embeddings as a positive integer, found -1"),
    "another vocabulary": ({"vocab_size": 390}, r"of shape \(390, 64\), by config.json, found \(384, 64\)"),
    "an odd head_dim": ({"head_dim": 33}, r"RoPE requires an even rotary dimension"),
    "a head_dim of zero": ({"head_dim": 0}, "head_dim as a positive integer, found 0"),
    # Numbers.
    "no eps": ({"rms_norm_eps": GONE}, "rms_norm_eps as a number that is not negative, found None"),
    "a negative eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps as a number that is not negative"),
    "an eps that is none": ({"rms_norm_eps": float("nan")}, r"config\.json: expected a JSON object, found .*NaN"),
    "an eps as text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps as a number that is not negative, found '1e-5'"),
    "a dropout beyond one": ({"attention_dropout": 2.0}, "dropout probability has to be between 0 and 1"),
    # Names.
    "an activation": ({"hidden_act": "banana"}, "hidden_act by a name that transformers knows, found 'banana'"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, r"transformers knows, found \[.silu.\]"),
    "a dtype": ({"torch_dtype": "banana"}, "torch_dtype as one of .*, found 'banana'"),
    "a model_type": ({"model_type": "llama9"}, "model_type .*, found model_type 'llama9'"),
    "no model_type": ({"model_type": GONE}, "found model_type None"),
    "a model_type that is a list": ({"model_type": ["llama"]}, r"found model_type \['llama'\]"),
    # Rope.
    "rope without its factor": ({"rope_scaling": {"type": "yarn"}, "rope_parameters": GONE}, r"Missing .*yarn.*factor"),
    "linear rope without its factor": ({"rope_parameters": {"rope_type": "linear", **ROPE}}, r"Missing .*'linear'"),
    "llama3 rope half": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **ROPE}}, r"Missing .*'llama3'"),
    "an unknown rope": ({"rope_parameters": {"rope_type": "banana", **ROPE}}, "a rope_type of .*, found 'banana'"),
    "rope as text": ({"rope_parameters": "yarn"}, "Field 'rope_parameters' with value 'yarn'"),
    "a factor as text": (
        {"rope_parameters": {"rope_type": "linear", "factor": "2", **ROPE}},
        "factor of the rope settings as a number, found '2'",
    ),
    "a negative factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": -2.0, **ROPE}},
        "rope settings that give frequencies above zero",
    ),
    "a theta of zero": ({"rope_theta": 0, "rope_parameters": GONE}, "rope settings that give frequencies above zero"),
    "a negative theta": ({"rope_theta": -1e4, "rope_parameters": GONE}, "rope settings that give frequencies"),
    # The rest.
    "layer_types of another length": (
        {"layer_types": ["full_attention"]},
        r"equal to the number of `layer_types` \(1\)",
    ),
    "a padding token without a row": ({"pad_token_id": 384}, "pad_token_id below vocab_size 384, found 384"),
    "an end token as text": ({"eos_token_id": "</s>"}, "Field 'eos_token_id' with value '</s>'"),
    "a flag as text": ({"attention_bias": "no"}, "Field 'attention_bias' expected bool, got str"),
    "tying as text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings as true or false, found 'no'"),
    "tuples for outputs": ({"return_dict": False}, "'tuple' object has no attribute"),
    "an attention that is not installed": ({"_attn_implementation": "banana"}, "banana.* is not supported"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose width its heads divide, so that a config without head_dim fits it."""
    return save_tiny_llama(tmp_path_factory.mktemp("config") / "base", head_dim=16)


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def write_config(base: Path, changes: dict[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not GONE}
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_line_at_every_command(case: str, base: Path):
    changes, message = BAD[case]
    if "hidden_size" in changes or "num_attention_heads" in changes:
        changes = {**changes, "head_dim": GONE}
    write_config(base, changes)
    # vLLM may know a family that the table does not, so vLLM refuses it or not.
    commands = ["pat-train", "pat-eval"] if "model_type" in changes else list(OPENERS)
    for command in commands:
        with pytest.raises(PatServeError, match=message) as refused:
            OPENERS[command](base)
        told = str(refused.value)
        assert "\n" not in told
        assert len(told) < 700
        assert "tokenizer" not in told
    assert not (base.parent / "run").exists()


def test_a_command_shows_the_line_and_nothing_else(base: Path, tmp_path: Path):
    """The case of the report: a width that its heads do not divide was called a defect of ours."""
    write_config(base, {"hidden_size": 200, "num_attention_heads": 12, "head_dim": GONE})
    command = [str(Path(sys.executable).with_name("pat-eval")), str(base), "--text", str(base / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"pat-eval: {base}/config.json: expected settings that the class")
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
@pytest.mark.parametrize("old", [False, True])
def test_scaled_ropes_are_taken(rope: dict[str, Any], old: bool, tmp_path: Path):
    """The config has both spellings in turn, and a head_dim that is not the width's share of a head (24, not 16)."""
    base = save_tiny_llama(tmp_path / "base", head_dim=24)
    if old:
        write_config(base, {"rope_scaling": rope, "rope_theta": 10_000.0, "rope_parameters": GONE})
    else:
        write_config(base, {"rope_parameters": rope | ROPE})
    accept(base)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [1, 2, 5]},
        # Ids without a row: a server compares them with what comes out, and nothing looks them up.
        {"eos_token_id": 99_999},
        {"eos_token_id": [1, 128_009]},
        # Llama 1's, which stands for none.
        {"pad_token_id": -1},
        {"bos_token_id": None},
        {"transformers_version": "4.0.0.dev0", "use_cache": False, "_name_or_path": "/somewhere"},
        {"architectures": GONE},
        {"head_dim": None},
        {"torch_dtype": "bfloat16", "dtype": GONE},
    ],
    ids=str,
)
def test_configs_that_are_fine(changes: dict[str, Any], base: Path):
    write_config(base, changes)
    accept(base)


def test_a_quantized_models_config_is_looked_at_too(tmp_path: Path):
    """The weights are not looked at, because the quantizer chose their names."""
    base = save_tiny_family(tmp_path / "base", "llama")
    edit_config(base, quantization_config={"quant_method": "compressed-tensors"})
    for command in ("pat-eval", "pat-serve", "pat-bench"):
        OPENERS[command](base)
    edit_config(base, rope_parameters={"rope_type": "yarn", **ROPE})
    for command in ("pat-eval", "pat-serve", "pat-bench"):
        with pytest.raises(PatServeError, match="Missing"):
            OPENERS[command](base)
