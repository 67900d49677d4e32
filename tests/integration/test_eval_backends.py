"""pat-eval's other backends give the figures of transformers: a running pat-serve, and vLLM in the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import KEY, Server, running
from tests.tiny_models import SENTENCES, save_tiny_llama
from tests.tiny_tokenizers import save_model_of_kind

pytestmark = pytest.mark.vllm
pytest.importorskip("lm_eval")

ITEMS = [
    {"origin_prompt": f"{text.split('.')[0]}.\nQuestion: Which may be the effect?\nA. one\nB. none at all\nAnswer:",
     "gold": "AB"[number % 2]}
    for number, text in enumerate(SENTENCES)
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "docs.txt").write_text(SENTENCES[0])
    (tmp_path / "COPA.json").write_text(json.dumps({str(i): item for i, item in enumerate(ITEMS)}))
    flags = ["--text", str(tmp_path / "docs.txt"), "--context-tokens", "64", "--task-data", str(tmp_path)]
    return [*flags, "--tasks", "pat14_copa,pat14_copa_ll", "--dtype", "float32", "--batch-size", "4", "--json"]


def evaluate(*arguments: str) -> dict[str, dict[str, Any]]:
    """pat-eval in a process of its own; measures by name."""
    command = [sys.executable, "-c", "from pat_serve.cli.eval import main; main()", *arguments]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # A log handler whose stream has been closed says so with a traceback, at the end of all.
    assert "Logging error" not in done.stderr
    assert "Traceback" not in done.stderr
    return {measure["name"]: measure for measure in json.loads(done.stdout)["measures"]}


def check(measures: dict[str, dict[str, Any]]) -> None:
    """Two models of one measure are the same one, asked in two ways."""
    assert set(measures) == {
        "ppl(docs.txt)", "acc(pat14_copa)", "acc(pat14_copa_ll)", "acc_norm(pat14_copa_ll)",
        "answer_nll(pat14_copa_ll)",
    }  # fmt: skip
    for name, measure in measures.items():
        first, second = measure["results"]
        assert second["versus_first"] is not None, f"{name}: {measure['notes']}"
        assert second["value"] == pytest.approx(first["value"], rel=1e-4), name
        assert second["items"] == first["items"]


def test_a_running_server(server: Server, arguments: list[str]):
    check(evaluate(str(server.model), server.url, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama 2", "Llama 3"])
def test_a_running_server_whose_tokenizer_begins_every_text(kind: str, tmp_path: Path, arguments: list[str]):
    """lm-eval's class for servers begins none, and the one for transformers as the tokenizer does."""
    # Longer than any item: what is too long is cut by one token less of a server.
    model = save_model_of_kind(tmp_path / "model", kind, max_position_embeddings=1024)
    flags = ["--dtype", "float32", "--kv-cache-gib", "0.1", "--api-key", f"tests={KEY}"]
    with running(model, tmp_path / "log.txt", *flags) as server:
        check(evaluate(str(model), server.url, *arguments))


@pytest.mark.slow
def test_vllm_in_the_process(tmp_path: Path, arguments: list[str]):
    model = save_tiny_llama(tmp_path / "tiny")
    by_vllm = evaluate(str(model), *arguments, "--backend", "vllm")
    by_transformers = evaluate(str(model), *arguments)
    for name, measure in by_transformers.items():
        measure["results"] += by_vllm[name]["results"]
        measure["results"][1]["versus_first"] = {}
    check(by_transformers)


@pytest.mark.slow
def test_vllm_judges_answers_that_its_cache_holds(tmp_path: Path):
    """A block of the cache has up to 128 tokens. vLLM gives no probabilities of those that it reads from there."""
    model = str(save_tiny_llama(tmp_path / "tiny"))
    rows = [json.dumps({"prompt": " ".join(text.split()[:6])}) for text in SENTENCES]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    flags = ["--prompts", str(tmp_path / "asked.jsonl"), "--answer-tokens", "160", "--dtype", "float32", "--json"]
    measures = evaluate(model, *flags, "--backend", "vllm")
    assert measures["length(asked.jsonl)"]["results"][0]["value"] > 128
    assert measures["agreement(asked.jsonl)"]["results"][0]["value"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_vllm_writes_the_answers_that_transformers_writes(tmp_path: Path):
    """Greedy ones in float32; over the other model's answers vLLM finds the same tokens likeliest."""
    models = [str(save_tiny_llama(tmp_path / name, seed=seed)) for name, seed in (("dense", 0), ("other", 1))]
    rows = [json.dumps({"prompt": " ".join(text.split()[:6])}) for text in SENTENCES]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    flags = ["--prompts", str(tmp_path / "asked.jsonl"), "--answer-tokens", "16", "--arithmetic", "--limit", "9"]
    flags += ["--dtype", "float32", "--batch-size", "4", "--json"]
    by_vllm = evaluate(*models, *flags, "--backend", "vllm")
    by_transformers = evaluate(*models, *flags)
    assert set(by_transformers) - set(by_vllm) == {"kl(asked.jsonl)"}
    for name, measure in by_vllm.items():
        # Sampled answers are drawn otherwise.
        if not name.endswith(" sampled)"):
            for one, other in zip(measure["results"], by_transformers[name]["results"], strict=True):
                assert one["value"] == pytest.approx(other["value"]), name
    own, other = (result["value"] for result in by_vllm["agreement(asked.jsonl)"]["results"])
    assert own == 1
    assert other < 0.5
    assert by_vllm["length(asked.jsonl sampled)"]["results"][0]["value"] > 0
