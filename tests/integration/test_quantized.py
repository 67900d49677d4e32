"""Quantised exports in the real vLLM, on the CPU: they answer what the float export answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pat_serve.cli.calibration import calibration_of
from pat_serve.export.exporter import export_run
from pat_serve.training.data import encode_rows, load_rows
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.integration.conftest import HANG_S, running, tail
from tests.tiny_models import save_tiny_llama, tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

QUESTIONS, ANSWER_TOKENS = 16, 4
SIZES = {"hidden_size": 256, "intermediate_size": 256}
# 8 bits move a logit of this model by less than 0.1, and 4 bits by some tenths; a token that leads by more must stay.
SURE_NATS = 1.5


@pytest.fixture(scope="module")
def examples(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[int]]]:
    """The rows as training sees them; -100 in the labels marks the question."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("tokenizer")))
    found, _ = encode_rows(load_rows(str(rows), "train", tokenizer), tokenizer, 256)
    return found


def train_base(folder: Path, examples: list[dict[str, list[int]]]) -> Path:
    """A base that knows questions and answers by heart: unsure answers would show nothing."""
    save_tiny_llama(folder, **SIZES)
    model = tiny_llama(**SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids_NT = pad_sequence([torch.tensor(row["input_ids"]) for row in examples], batch_first=True, padding_value=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        ids_BT = ids_NT[torch.randint(len(ids_NT), (8,), generator=generator)]
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
        F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], ignore_index=2).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(rows: Path, examples: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that cuts nothing and one whose narrow model still answers, both in widths of 4-bit groups of 128."""
    folder = tmp_path_factory.mktemp("quantized")
    base = train_base(folder / "base", examples)
    start(tiny_recipe(base, rows, method="lora", max_steps=1, learning_rate=1e-5), folder / "dense")
    narrow = {"learning_rate": 5e-3, "rotate": "loss", "mask_start": "energy", "gate": "cut", "compensate": True}
    start(tiny_recipe(base, rows, hidden_size=128, **narrow), folder / "pruned")
    return {"dense": folder / "dense", "pruned": folder / "pruned"}


# The scheme, the run that is exported, and a part of the name of the kernel that vLLM takes for it on a CPU. The kernel
# for 4 bits has no float32.
CASES = [
    ("int8", "pruned", "Int8ScaledMM"),
    ("int4", "dense", "CPUWNA16"),
    ("int4", "pruned", "CPUWNA16"),
    ("fp8", "pruned", "FP8ScaledMM"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case[:2]))
def exports(
    request: pytest.FixtureRequest, runs: dict[str, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """The same run in float32 and in few bits, and the kernel to expect."""
    scheme, name, kernel = request.param
    folder, run = tmp_path_factory.mktemp(scheme), runs[name]
    exact = export_run(run, folder / "exact")
    calibration = calibration_of(str(rows), run) if scheme == "int4" else None
    dtype = "bfloat16" if scheme == "int4" else "auto"
    done = export_run(run, folder / scheme, dtype=dtype, quantize=scheme, calibration=calibration)
    assert done.quality is not None
    assert done.quality.perplexity_before < 5
    return exact.out, done.out, kernel


@pytest.fixture(scope="module")
def url(exports: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    dtype = "bfloat16" if exports[2] == "CPUWNA16" else "float32"
    with running(exports[1], log, "--dtype", dtype, "--kv-cache-gib", "0.25") as server:
        assert exports[2] in log.read_text(), tail(log)  # vLLM chose this kernel and did not dequantise
        yield server.url


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int]) -> tuple[list[int], list[float]]:
    """The greedy answer, and how far ahead each of its tokens is of the second best, in nats."""
    answer, leads = [], []
    for _ in range(ANSWER_TOKENS):
        best = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].log_softmax(-1).topk(2)
        answer.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return answer, leads


def test_vllm_answers_as_the_float_model_does(
    exports: tuple[Path, Path, str], url: str, examples: list[dict[str, list[int]]]
) -> None:
    """Greedy tokens agree as long as the float model is surer of each than a few bits can change."""
    model = AutoModelForCausalLM.from_pretrained(exports[0], dtype=torch.float32).eval()
    sure = right = 0
    for example in examples[:QUESTIONS]:
        question = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label < 0]
        expected, leads = greedy(model, question)
        body = {"prompt_token_ids": question, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        found = httpx.post(f"{url}/generate", json=body, timeout=HANG_S).raise_for_status().json()["token_ids"]
        certain = next((at for at, lead in enumerate(leads) if lead < SURE_NATS), ANSWER_TOKENS)
        assert found[:certain] == expected[:certain], (expected, found, leads)
        sure += certain
        right += found[:3] == example["input_ids"][len(question) : len(question) + 3]
    assert sure >= QUESTIONS * ANSWER_TOKENS // 2  # else this test would see little
    assert right >= QUESTIONS // 2  # and most answers are the data's, in 4 bits too
