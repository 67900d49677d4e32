"""Bases of which transformers and vLLM would load something else than their files hold: refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.locate import locate
from pat_serve.errors import BrokenCheckpoint, PatServeError, UnsupportedModel
from pat_serve.evaluation.backends import BackendSettings
from pat_serve.evaluation.subject import Subject
from pat_serve.export.exporter import export_run
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.engine.serve import parse_serve_arguments
from pat_serve.server.start.whole_model import check_whole_models
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.test_bad_input import edit_config, edit_weights
from tests.tiny_models import save_tiny_family

HEAD, EMBEDDING, SHARD = "lm_head.weight", "model.embed_tokens.weight", "model.safetensors"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def _serve(base: Path) -> None:
    args = parse_serve_arguments(["--model", str(base), "--load-format", "safetensors"])
    check_whole_models(args, str(base), baseline=None, draft=None)


def _bench(base: Path) -> None:
    resolve(str(base), flag="--model", load_format="auto", layers=None, scratch=base.parent / "scratch")


def _evaluate(base: Path) -> None:
    Subject("base", base, BackendSettings(), lambda _: None)


OPENERS: dict[str, Callable[[Path], object]] = {
    "pat-train": lambda base: start(tiny_recipe(base, base.parent / "rows.jsonl"), base.parent / "run"),
    "pat-eval": _evaluate,
    "pat-serve": _serve,
    "pat-bench": _bench,
}


def refuse(base: Path, kind: type[PatServeError], message: str) -> None:
    """Every command that opens a checkpoint to work on it says the same."""
    for opens in OPENERS.values():
        with pytest.raises(kind, match=message):
            opens(base)


def accept(base: Path) -> None:
    """All of them go on; a training would begin."""
    open_checkpoint(str(base))
    for opens in (_evaluate, _serve, _bench):
        opens(base)


def test_a_tied_model_with_a_head_of_its_own(base: Path):
    edit_config(base, tie_word_embeddings=True)
    refuse(base, BrokenCheckpoint, r"tie_word_embeddings: true only where.*found a head of its own")


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_a_tied_model_whose_head_is_stored_too(model_type: str, tmp_path: Path):
    """Some savers write the one tensor twice; gemma is tied where the config does not say so."""
    base = save_tiny_family(tmp_path / "base", model_type, head_dim=16, tie_word_embeddings=True)
    edit_weights(base, **{HEAD: load_file(base / SHARD)[EMBEDDING].clone()})
    config = json.loads((base / "config.json").read_text())
    if model_type == "gemma":
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
    accept(base)
    head = load_file(base / SHARD)[HEAD]
    head[-1, -1] += 1
    edit_weights(base, **{HEAD: head})
    with pytest.raises(BrokenCheckpoint, match="found a head of its own"):
        open_checkpoint(str(base))


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        ([Q_BIAS], "attention_bias (now false)"),
        (["model.layers.1.mlp.down_proj.bias"], "mlp_bias (now false)"),
        ([Q_BIAS, "model.layers.0.mlp.down_proj.bias"], "attention_bias (now false) and mlp_bias (now false)"),
    ],
)
def test_biases_that_the_config_denies(names: list[str], flags: str, base: Path):
    weights = load_file(base / SHARD)
    biases = {name: torch.ones(len(weights[name.replace("bias", "weight")])) for name in names}
    edit_weights(base, **biases)
    with pytest.raises(BrokenCheckpoint, match="which would be left out") as refused:
        open_checkpoint(str(base))
    assert flags in str(refused.value)
    refuse(base, BrokenCheckpoint, "none for .*bias.*, which would be left out")


@pytest.mark.parametrize(("setting", "example"), [("attention_bias", "self_attn"), ("mlp_bias", "mlp")])
def test_biases_that_only_the_config_has(setting: str, example: str, base: Path):
    edit_config(base, **{setting: True})
    refuse(base, BrokenCheckpoint, rf"no model\.layers\.0\.{example}\S+bias and \d+ others, which would be made up")


def test_a_qwen2_without_its_biases(tmp_path: Path):
    """Qwen2's class has the biases whatever the config says."""
    base = save_tiny_family(tmp_path / "base", "qwen2")
    accept(base)
    edit_weights(base, **{"model.layers.1.self_attn.k_proj.bias": None})
    with pytest.raises(BrokenCheckpoint, match=r"no model\.layers\.1\.self_attn\.k_proj\.bias, which would be made up"):
        open_checkpoint(str(base))


def test_more_layers_than_the_config_has(base: Path):
    edit_config(base, num_hidden_layers=1)
    for opens in OPENERS.values():
        with pytest.raises(BrokenCheckpoint, match=r"1 layers, as config.json says|would be left out"):
            opens(base)


@pytest.mark.parametrize("layers", [3, 10**9])
def test_fewer_layers_than_the_config_has(layers: int, base: Path):
    edit_config(base, num_hidden_layers=layers)
    refuse(base, BrokenCheckpoint, r"would be made up|the tensors of 1000000000 layers")


def test_a_missing_tensor(base: Path):
    edit_weights(base, **{"model.norm.weight": None})
    refuse(base, BrokenCheckpoint, r"no model\.norm\.weight, which would be made up")


def test_a_tensor_of_another_shape(base: Path):
    edit_config(base, vocab_size=400)
    refuse(base, BrokenCheckpoint, r"of shape \(400, 64\), by config.json, found \(384, 64\)")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("transformers_weights", "other.safetensors"),
        ("logit_scale", 0.5),
        ("qkv_bias", True),
        ("is_causal", False),
        ("text_config", {"hidden_size": 8}),
    ],
)
def test_a_setting_that_only_one_runtime_reads(setting: str, value: object, base: Path):
    edit_config(base, **{setting: value})
    refuse(base, UnsupportedModel, f"{setting} = .*, which only one of them reads")


def test_settings_with_which_both_compute_the_same(base: Path):
    edit_config(base, logit_scale=1.0, qkv_bias=False, is_causal=True, text_config=None, architectures=None)
    accept(base)


def test_architectures_of_another_class(base: Path):
    """vLLM takes the class that stands there, transformers that of model_type."""
    edit_config(base, architectures=["LlamaForSequenceClassification"])
    refuse(base, UnsupportedModel, r'expected architectures \["LlamaForCausalLM"\]')


def test_sliding_layers_of_a_llama(base: Path):
    edit_config(base, layer_types=["full_attention", "sliding_attention"], sliding_window=16)
    refuse(base, UnsupportedModel, "sliding_attention'], which vLLM's class reads")


def test_an_adapter_in_the_models_folder(base: Path):
    """transformers answers with the adapter's help: with peft installed it is loaded without being asked for."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned: Any = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(base)
    with_adapter = AutoModelForCausalLM.from_pretrained(base)
    assert any("lora" in name for name, _ in with_adapter.named_parameters())
    refuse(base, UnsupportedModel, r"an adapter beside it \(adapter_config.json\)")


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"]
)
def test_other_weights_beside_a_single_file(name: str, base: Path):
    """transformers reads the one file and vLLM all."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(4)}, base / name)
    with pytest.raises(BrokenCheckpoint, match=rf"{name} beside it and no model\.safetensors\.index\.json"):
        open_checkpoint(str(base))
    for opens in (_serve, _bench):
        with pytest.raises(BrokenCheckpoint, match=r"layers\.0\.attention\.wq\.weight.*would be left out"):
            opens(base)


def test_consolidated_weights_beside_an_index(base: Path):
    """A folder of Mistral's: shards with an index, the same weights in the authors' own format, and pickles."""
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / SHARD).unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    save_file({"layers.0.attention.wq.weight": torch.zeros(4)}, base / "consolidated.safetensors")
    (base / "params.json").write_text(json.dumps({"dim": 64}))
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    accept(base)


def test_a_single_file_and_an_index_that_names_only_it(base: Path):
    weights = load_file(base / SHARD)
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, SHARD)}))
    accept(base)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(list(weights)[1:], SHARD)}))
    with pytest.raises(BrokenCheckpoint, match="in no shard"):
        open_checkpoint(str(base))


@pytest.mark.parametrize("name", ["config.json", SHARD, "tokenizer.json", "generation_config.json"])
def test_a_link_to_nothing(name: str, base: Path):
    """A hub snapshot that was copied without its blobs has such links."""
    (base / name).unlink()
    (base / name).symlink_to("../../blobs/0123abcd")
    # The server looks for its model's folder before its weights.
    for opens in (
        *(OPENERS[command] for command in ("pat-train", "pat-eval", "pat-bench")),
        lambda base: locate(str(base)),
    ):
        with pytest.raises(BrokenCheckpoint, match=rf"{name}: expected a file, found a link to .*cp -rL"):
            opens(base)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_every_family_is_what_its_class_loads(model_type: str, tmp_path: Path):
    settings = {"head_dim": 16} if model_type in ("qwen3", "gemma") else {}
    settings |= {"sliding_window": 32} if model_type in ("mistral", "phi3") else {}
    accept(save_tiny_family(tmp_path / "base", model_type, **settings))


def test_weights_of_several_dtypes(base: Path):
    """Norms in float32 beside bfloat16 linears, as some savers leave them."""
    weights = {name: w if "norm" in name else w.bfloat16() for name, w in load_file(base / SHARD).items()}
    save_file(weights, base / SHARD)
    accept(base)


def test_an_export_says_what_is_wrong_with_its_base(finished_run: Path, base: Path, tmp_path: Path):
    edit_weights(base, **{Q_BIAS: torch.ones(128)})
    with pytest.raises(BrokenCheckpoint, match="would be left out"):
        export_run(finished_run, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()
