"""The exported model is the trained one: in float64 and float32, biases and ties included."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pat_serve.errors import ParityError
from pat_serve.export import exporter
from pat_serve.export.exporter import export_run
from pat_serve.export.parity.masked import load_masked_model
from pat_serve.export.rewrite import job
from pat_serve.export.rewrite.fused import fuse
from pat_serve.export.run.reader import open_run
from tests.random_runs import PROMPT, random_run
from tests.tiny_models import save_tiny_llama, tiny_llama


def both_logits(run_folder: Path, exported: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    run = open_run(run_folder)
    with torch.no_grad():
        wide = load_masked_model(run, dtype)(input_ids=PROMPT).logits
        narrow = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)(input_ids=PROMPT).logits
    return wide, narrow


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch):
    """transformers' RMSNorm computes in float32 whatever the dtype; here it keeps float64, by the same formula."""

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "large eps": {"rms_norm_eps": 0.1},
    "no explicit head_dim": {"head_dim": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_in_float64(variant: str, tmp_path: Path, float64_norms: None):
    overrides = {key: value for key, value in VARIANTS[variant].items() if value is not None}
    if "head_dim" in VARIANTS[variant]:
        overrides["head_dim"] = 16
    base = save_tiny_llama(tmp_path / "base", dtype=torch.float64, **overrides)
    if "head_dim" in VARIANTS[variant]:
        config = json.loads((base / "config.json").read_text())
        del config["head_dim"]
        (base / "config.json").write_text(json.dumps(config))
    run = random_run(tmp_path / "run", base)
    out = export_run(run, tmp_path / "out", parity=False).out
    wide, narrow = both_logits(run, out, torch.float64)
    assert wide.dtype == narrow.dtype == torch.float64
    assert (wide - narrow).abs().max() < 1e-9
    assert wide.std() > 0.1


@pytest.mark.parametrize("variant", ["plain", "biases", "tied"])
def test_equal_in_float32(variant: str, tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", **VARIANTS[variant])
    done = export_run(random_run(tmp_path / "run", base), tmp_path / "out")
    wide, narrow = both_logits(tmp_path / "run", done.out, torch.float32)
    assert (wide - narrow).abs().max() / wide.std() < 1e-5
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.input_layernorm.weight", lambda tensor: tensor * 0.75**0.5),  # the gain's factor left out
        ("model.embed_tokens.weight", lambda tensor: tensor * 1.001),
        ("model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.roll(1, 0)),  # channels out of order
    ],
)
def test_the_gate_refuses_a_wrong_rewriting(
    name: str, change, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Damage one tensor between writing and checking; nothing may be left behind."""
    write = exporter._write_model

    def write_damaged(run, folder: Path, *arguments, **settings) -> dict[str, str]:
        hashes = write(run, folder, *arguments, **settings)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return hashes

    monkeypatch.setattr(exporter, "_write_model", write_damaged)
    with pytest.raises(ParityError, match=f"{name} to be the rewritten tensor"):
        export_run(finished_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mistake", ["eps", "scale"])
def test_the_gate_refuses_the_published_mistakes(
    mistake: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An eps that stays and a scale that is dropped: both could hide in 16-bit rounding."""
    base = save_tiny_llama(tmp_path / "base", rms_norm_eps=1e-3)
    run = random_run(tmp_path / "run", base, scale_spread=0.01)
    if mistake == "eps":
        monkeypatch.setattr("pat_serve.export.rewrite.config.exported_eps", lambda eps, cut: eps)
    else:
        monkeypatch.setattr(job, "fuse", lambda spec, *parts: replace(fuse(spec, *parts), scale_K=None))
    with pytest.raises(ParityError, match="found"):
        export_run(run, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def amplifying_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base multiplies rounding from layer to layer: in float32 even a right export is off by 1.2e-4."""
    folder = tmp_path_factory.mktemp("amplifying")
    base = save_tiny_llama(folder / "base", num_hidden_layers=16)
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(base)
    return random_run(folder / "run", base, scale_spread=1e-3)


@pytest.mark.parametrize("walk", [False, True])
def test_float64_judges_a_model_that_float32_cannot(walk: bool, amplifying_run: Path, tmp_path: Path):
    parity = export_run(amplifying_run, tmp_path / "out", walk=walk).parity
    assert parity is not None
    exact = parity.comparisons[0]
    assert (exact.model, exact.dtype) == ("exported, not rounded", "float64")
    assert exact.figures.max_abs_over_std < 1e-10
    own = next(found for found in parity.comparisons if found.model == "trained")
    assert 1e-4 < own.figures.max_abs_over_std < 1e-2
    judged = next(found for found in parity.comparisons if found.yardstick == "trained in float32")
    assert (judged.model, judged.dtype) == ("exported", "float32")
    assert "judged in float64" in parity.notes[-1]


@pytest.mark.parametrize("mistake", ["eps", "one number"])
def test_a_mistake_does_not_hide_in_a_model_that_amplifies(
    mistake: str, amplifying_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if mistake == "eps":
        monkeypatch.setattr("pat_serve.export.rewrite.config.exported_eps", lambda eps, cut: eps)
    else:
        write = exporter._write_model

        def write_damaged(run, folder: Path, *arguments, **settings) -> dict[str, str]:
            hashes = write(run, folder, *arguments, **settings)
            tensors = load_file(folder / "model.safetensors")
            tensors["model.embed_tokens.weight"][7, 7] *= 1.00001
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return hashes

        monkeypatch.setattr(exporter, "_write_model", write_damaged)
    with pytest.raises(ParityError, match="found"):
        export_run(amplifying_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_are_the_float32_ones_rounded(dtype: str, finished_run: Path, tmp_path: Path):
    export_run(finished_run, tmp_path / "exact", dtype="float32")
    export_run(finished_run, tmp_path / "rounded", dtype=dtype)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), rounded[name])
    assert not (tmp_path / "rounded/.float32").exists()


def test_the_trained_model_is_the_masked_one(tiny_base: Path, rows: Path, tmp_path: Path):
    """Closes the chain: what training computed at its last step is what a plan rebuilds from disk."""
    from pat_serve.training import run as training_run
    from tests.conftest import tiny_recipe

    trained = {}
    finish = training_run._finish

    def keep_model(prepared, run, job, ranks) -> None:
        with torch.no_grad():
            trained["logits"] = job.trainer.model.eval()(input_ids=PROMPT).logits
        finish(prepared, run, job, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "_finish", keep_model)
        training_run.start(tiny_recipe(tiny_base, rows), tmp_path / "run")
    with torch.no_grad():
        rebuilt = load_masked_model(open_run(tmp_path / "run"), torch.float32)(input_ids=PROMPT).logits
    torch.testing.assert_close(rebuilt, trained["logits"], rtol=1e-5, atol=1e-5)
    untouched = tiny_llama()(input_ids=PROMPT).logits
    assert (rebuilt - untouched).abs().max() > 0.1


def test_lora_alone_exports_to_the_bases_own_shape(tiny_base: Path, rows: Path, tmp_path: Path):
    from pat_serve.training.run import start
    from tests.conftest import tiny_recipe

    start(tiny_recipe(tiny_base, rows, method="lora"), tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "dense")
    assert done.record["parameters"]["base"] == done.record["parameters"]["exported"]
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 1e-5
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "dense/model.safetensors")
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_sharded_and_16_bit(finished_run: Path, tmp_path: Path):
    done = export_run(finished_run, tmp_path / "out", dtype="bfloat16", max_shard_bytes=60_000)
    shards = sorted(path.name for path in done.out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    model, report = AutoModelForCausalLM.from_pretrained(done.out, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.config.hidden_size == 48
    assert model.config.head_dim == 32


def test_stock_transformers_loads_it_without_this_package(finished_run: Path, tmp_path: Path):
    out = export_run(finished_run, tmp_path / "out").out
    script = (
        "import sys; sys.modules['pat_serve'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})\n"
        "print(type(model).__name__, model.config.hidden_size, sum(p.numel() for p in model.parameters()))\n"
        "print(tokenizer.decode(model.generate(**tokenizer('Join list', return_tensors='pt'), max_new_tokens=4)[0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    record = json.loads((out / "pat_export.json").read_text())
    assert done.stdout.startswith(f"LlamaForCausalLM 48 {record['parameters']['exported']}\n")
