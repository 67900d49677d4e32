"""Other people's clients against the real server, each as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from transformers import AutoTokenizer

from tests.integration.conftest import KEY, MAX_MODEL_LEN, Server, metric, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("serves_afterwards")]

PROMPT = "Return a new dictionary"
MESSAGES: Any = [{"role": "user", "content": "Return a new dictionary"}]


@pytest.fixture
def api(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture
def model(server: Server) -> str:
    return str(server.model)


def test_openai_completions(api: openai.OpenAI, model: str) -> None:
    whole = api.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    tokens = len(AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"])
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (tokens, tokens + whole.usage.completion_tokens)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or ()) == whole.usage.completion_tokens

    options: Any = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    *chunks, last = api.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage == whole.usage
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    several = api.completions.create(model=model, prompt=[PROMPT, "b"], n=2, max_tokens=3, temperature=1, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_openai_chat(api: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = api.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12 or whole.choices[0].finish_reason == "stop"
    *chunks, last = api.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage


def test_openai_errors(server: Server, api: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.completions.create(model="another", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as wrong:
        api.completions.create(model=model, prompt=PROMPT, n=10**6)
    assert (wrong.value.type, wrong.value.param) == ("invalid_request", "n")
    assert wrong.value.request_id == wrong.value.response.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        api.chat.completions.create(model=model, messages=MESSAGES, max_tokens=MAX_MODEL_LEN + 1)
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model=model, input="a")


def test_openai_client_that_stops_reading(server: Server, api: openai.OpenAI, model: str, client: httpx.Client) -> None:
    before = metric(client, "vllm:generation_tokens_total")
    endless: Any = {"model": model, "messages": MESSAGES, "max_tokens": MAX_MODEL_LEN - 100, "stream": True}
    with server.brake.held():
        with api.chat.completions.create(**endless, extra_body={"ignore_eos": True}) as stream:
            assert next(iter(stream)).choices
        wait_for(client, "vllm:num_requests_running", 0)
    assert metric(client, "vllm:generation_tokens_total") - before < MAX_MODEL_LEN - 100


def run(arguments: list[str], folder: Path, **variables: str) -> str:
    """Run a tool in a process of its own, without the hub; its output, if it ends well."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=os.environ | offline | variables,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("request_format", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server: Server, tmp_path: Path, request_format: str) -> None:
    pytest.importorskip("guidellm")
    command = ["-c", "from guidellm.__main__ import cli; cli()", "run", "--disable-progress"]
    backend = {
        "kind": "openai_http", "target": server.url, "model": str(server.model), "api_key": KEY,
        "request_format": request_format,
    }  # fmt: skip
    report = tmp_path / "report.json"
    settings: dict[str, dict[str, Any]] = {
        "--backend": backend,
        "--tokenizer": {"kind": "huggingface_auto", "model": str(server.model)},
        "--data": {"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": 8},
        "--profile": {"kind": "constant", "rate": 4},
        "--constraint": {"kind": "max_requests", "count": 8},
        "--output": {"kind": "json", "path": str(report)},
    }
    for flag, value in settings.items():
        command += [flag, json.dumps(value)]
    run(command, tmp_path)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    # guidellm cuts off what is in flight when it has seen enough, which on a busy machine may be the last ones.
    assert (totals["errored"], totals["total"]) == (0, 8)
    assert totals["successful"] >= 4
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] == 8


@pytest.mark.slow
def test_vllm_bench_serve(server: Server, tmp_path: Path) -> None:
    """The `vllm` command itself asks for a distribution of that name, which its CPU build does not have."""
    code = (
        "import sys\n"
        "from vllm.benchmarks.serve import add_cli_args, main\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser()\n"
        "add_cli_args(parser)\n"
        "main(parser.parse_args(sys.argv[1:]))\n"
    )
    flags = [
        "--base-url", server.url, "--model", str(server.model), "--dataset-name", "random", "--num-prompts", "12",
        "--random-input-len", "16", "--random-output-len", "8", "--ignore-eos", "--request-rate", "inf",
        "--max-concurrency", "4", "--disable-tqdm", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "result.json",
    ]  # fmt: skip
    for backend, endpoint in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
        run(["-c", code, "--backend", backend, "--endpoint", endpoint, *flags], tmp_path, OPENAI_API_KEY=KEY)
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["completed"], result["total_output_tokens"]) == (12, 96)
        assert result["mean_ttft_ms"] > 0


TASK = {
    "task": "local_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.slow
def test_lm_eval_local_completions(server: Server, tmp_path: Path) -> None:
    """The same figures as lm-eval's own run of the model, log-likelihoods and generated text."""
    pytest.importorskip("lm_eval")
    questions = [
        {"question": f"Return the {word}:", "choices": [" list", " dictionary", " set of them"], "answer": index % 3}
        for index, word in enumerate(["first", "last", "new", "other", "same", "whole"])
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in questions))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tasks / "choice.yaml").write_text(yaml.safe_dump(TASK | files))
    generate = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
    metrics = {"metric_list": [{"metric": "exact_match"}], "doc_to_target": "{{choices[0]}}"}
    other = {key: value for key, value in TASK.items() if key != "doc_to_choice"} | generate | metrics | files
    (tasks / "text.yaml").write_text(yaml.safe_dump(other | {"task": "local_text"}))

    def evaluate(name: str, *flags: str) -> dict[str, list[Any]]:
        out = tmp_path / name
        command = ["-m", "lm_eval", "run", "--tasks", "local_choice,local_text", "--include_path", str(tasks)]
        command += ["--log_samples", "--output_path", str(out), *flags]
        run(command, tmp_path, OPENAI_API_KEY=KEY)
        samples: dict[str, list[Any]] = {}
        for task in ("local_choice", "local_text"):
            [file] = out.rglob(f"samples_{task}_*.jsonl")
            rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
            samples[task] = [row["filtered_resps"] for row in rows]
        return samples

    arguments = f"model={server.model},base_url={server.url}/v1/completions,tokenizer_backend=huggingface"
    served = evaluate("served", "--model", "local-completions", "--model_args", f"{arguments},num_concurrent=3")
    local = evaluate(
        "local", "--model", "hf", "--model_args", f"pretrained={server.model},dtype=float32", "--device", "cpu"
    )

    def whole(task: list[Any]) -> list[str]:
        # Where the last token ends within a character, vLLM leaves the character out.
        return [text.rstrip("\ufffd") for [text] in task]

    assert whole(served["local_text"]) == whole(local["local_text"])
    for ours, theirs in zip(served["local_choice"], local["local_choice"], strict=True):
        for (likelihood, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
            assert float(likelihood) == pytest.approx(float(expected), abs=2e-3)
            assert str(greedy) == str(expected_greedy)
