"""Models that an exact export does not cover: one error that says what is unusual, from real saved checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import UnknownTensor, UnsupportedModel
from pat_serve.families.architectures import FAMILIES
from tests.tiny_models import save_tiny_family

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNUSUAL = {
    "gpt_neox": ({}, [r"LayerNorms, which .*layer_norm\.bias", r"a parallel block.*use_parallel_residual"]),
    "phi": ({}, [r"LayerNorms.*layernorm\.bias", r"a parallel block.* \(model.*input_layernorm"]),
    "cohere": ({"num_key_value_heads": 4}, [r"LayerNorms.*layer_norm_eps", "a parallel block"]),
    "gpt2": ({}, [r"LayerNorms", r"transformer\.h\.\{i\}\.attn\.c_attn\.bias and \d+ other kinds"]),
    "gemma2": ({"head_dim": 8}, [r"post-norms .*post_feedforward_layernorm"]),
    "olmo2": ({}, [r"post-norms .*post_feedforward_layernorm"]),
    "mixtral": ({"num_local_experts": 2}, [r"a mixture of experts \(num_local_experts\)"]),
}


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_what_is_unusual_is_said(model_type: str, tmp_path: Path):
    overrides, expected = UNUSUAL[model_type]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | overrides))).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=rf"found model_type '{model_type}' with") as caught:
        open_checkpoint(str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for covered in FAMILIES:
        assert covered in message
    for reason in expected:
        assert caught.match(reason)


def test_a_multimodal_wrapper(tmp_path: Path):
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"a multimodal wrapper \(text_config, vision_config\)"):
        open_checkpoint(str(tmp_path))


def test_weights_that_cannot_be_read_leave_what_the_config_says(tmp_path: Path):
    AutoConfig.for_model("mixtral", **SIZES).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UnsupportedModel, match="a mixture of experts"):
        open_checkpoint(str(tmp_path))


def test_a_sliding_qwen2_would_lose_its_window(tmp_path: Path):
    base = save_tiny_family(tmp_path, "qwen2", use_sliding_window=True, max_window_layers=1)
    with pytest.raises(UnsupportedModel, match=r"without use_sliding_window, found use_sliding_window = True.*Llama"):
        open_checkpoint(str(base))


def test_a_phi3_with_long_rope(tmp_path: Path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    base = save_tiny_family(
        tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=128, partial_rotary_factor=1.0
    )
    with pytest.raises(UnsupportedModel, match=r"rope_parameters\.short_factor.*checks the length"):
        open_checkpoint(str(base))


def test_biases_that_stock_vllm_would_drop(tmp_path: Path):
    base = save_tiny_family(tmp_path, "qwen3", attention_bias=True)
    with pytest.raises(UnknownTensor, match=r"q_proj\.bias|k_proj\.bias|v_proj\.bias|o_proj\.bias"):
        open_checkpoint(str(base))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in the hub's cache, as the hub's client lays it out."""
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    shutil.copytree(tiny_base, repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "someone/tiny"


@pytest.mark.parametrize("asked", [None, "main", COMMIT])
def test_a_hub_model_is_recorded_by_its_commit(asked: str | None, cached: str):
    checkpoint = open_checkpoint(cached, asked)
    reference = checkpoint.reference()
    assert (reference.source, reference.revision) == (cached, COMMIT)
    assert open_checkpoint(reference.source, reference.revision).folder == checkpoint.folder


def test_a_local_folder_has_no_commit(tiny_base: Path):
    assert open_checkpoint(str(tiny_base)).reference().revision is None


def test_a_hub_model_is_refused_before_its_weights_are_there(cached: str, tmp_path: Path):
    snapshot = tmp_path / "models--someone--tiny/snapshots" / COMMIT
    config = json.loads((snapshot / "config.json").read_text())
    for path in snapshot.iterdir():
        path.unlink()
    (snapshot / "config.json").write_text(json.dumps(config | {"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(UnsupportedModel, match="a mixture of experts"):
        open_checkpoint(cached)
