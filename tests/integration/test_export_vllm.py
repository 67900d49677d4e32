"""Every class and every cut of an export, in a real vLLM engine: the same logits and text as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pat_serve.export.exporter import Exported, export_run
from pat_serve.export.parity.comparison import VLLM
from pat_serve.families.architectures import FAMILIES
from pat_serve.server.engine.workers.scoring import score_with_vllm
from tests.random_runs import random_run
from tests.test_export_axes import OWN, SIZES
from tests.test_families import BASES
from tests.tiny_models import save_tiny_family

pytestmark = pytest.mark.vllm

# By the class of the export. Each needs an engine of its own: two in one process tear down each other's groups. So one
# export alone is among the tests that everybody runs, QUICK_CUT below.
CLASSES = {
    "LlamaForCausalLM, from a Qwen2": "Qwen2.5",
    "LlamaForCausalLM": "Llama 3.2, tied",
    "MistralForCausalLM": "Mistral",
    "Qwen3ForCausalLM": "Qwen3",
    "GemmaForCausalLM": "Gemma",
    "Phi3ForCausalLM": "Phi-3",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_vllm_computes_what_was_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Threads that spin for tiny matrices stand in each other's way.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model_type, settings = BASES[CLASSES[name]]
    # Heads of 32: vLLM's CPU kernels know no smaller ones.
    base = save_tiny_family(tmp_path / "base", model_type, **{**settings, "hidden_size": 128, "head_dim": 32})
    done = export_run(random_run(tmp_path / "run", base, width=96), tmp_path / "out", scorer=score_with_vllm)
    assert done.record["architecture"] == name.split(",")[0]
    check(done)


# Sizes that vLLM's CPU kernels know: channels in 8s, heads of 32.
CUTS = {
    "layers": {"layers": 3},
    "ffn": {"ffn": 88},
    "kv_groups": {"kv_groups": 2},
    "all": {"hidden": 96, "layers": 3, "ffn": 88, "kv_groups": 2},
    "3 groups": {"hidden": 104, "layers": 3, "ffn": 88, "kv_groups": 3},
}
# A Llama that is written as a Mistral, with every axis cut.
QUICK_CUT = ("llama", "3 groups")
# Qwen2 has no head_dim and so none for 3 groups; the others take all.
EVERY_CUT = [(family, cut) for family in FAMILIES for cut in CUTS if (family, cut) != ("qwen2", "3 groups")]


@pytest.mark.parametrize(
    ("model_type", "cut"), [QUICK_CUT, *(pytest.param(*c, marks=pytest.mark.slow) for c in EVERY_CUT if c != QUICK_CUT)]
)
def test_vllm_computes_every_cut(model_type: str, cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    head_dim = {} if model_type == "qwen2" else {"head_dim": 32}
    sizes = {"hidden_size": 128 if head_dim else 256, "intermediate_size": 128, **head_dim}
    settings = {**SIZES, **OWN[model_type], **sizes}
    # vLLM has one window for all layers or one of its own for each: the tests of transformers have the latter.
    settings |= {"use_sliding_window": False} if model_type == "qwen3" else {}
    base = save_tiny_family(tmp_path / "base", model_type, **settings)
    run = random_run(tmp_path / "run", base, counts=CUTS[cut])
    done = export_run(run, tmp_path / "out", scorer=score_with_vllm)
    if (model_type, cut) == QUICK_CUT:
        assert done.record["architecture"] == "MistralForCausalLM"
    check(done)


def check(done: Exported) -> None:
    assert done.parity is not None
    [outcome] = [comparison for comparison in done.parity.comparisons if comparison.runtime == VLLM]
    assert outcome.dtype == "float32"
    assert outcome.figures.positions > 100
    assert outcome.figures.max_abs_over_std < 2e-5
    assert outcome.figures.top1_agreement == 1
    assert outcome.greedy.equal == outcome.greedy.prompts == 3
    assert outcome.greedy.new_tokens == 32
