"""The settings of a server's command line, and the command line for vLLM that follows from them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pat_serve.checkpoints.locate import stock_path
from pat_serve.machine.hardware import available_memory_bytes, serving_dtype
from pat_serve.server.engine.draft import speculative_config
from pat_serve.server.http.access_log import LogFormat
from pat_serve.server.http.policy import Feature, Policy

GIB = 2**30
DEFAULT_KV_CACHE_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of the command line.

    Attributes:
        model: a folder, a GGUF file or a hub id.
        dtype: auto, or a dtype that vLLM knows.
        max_model_len: tokens of prompt and output together; None takes it from the model.
        kv_cache_gib: memory for keys and values; None chooses by the machine's memory (CPU) or leaves it to vLLM.
        compiled: let torch compile the model at the start (CPU only; vLLM decides elsewhere).
        draft: folder or hub id of a smaller model that proposes tokens for this one to check; None without.
        draft_tokens: tokens that the draft proposes in a step.
        vllm_flags: handed to vLLM's own parser.
        policy: bounds of the HTTP side; its keys are added by `run`.
        api_keys: KEY or NAME=KEY each; never shown.
        api_key_file: file with one key a line.
        log_format: form of a line in the access log.
        baseline: dense parent that runs beside the model; folder or hub id.
    """

    model: str
    host: str
    port: int
    dtype: str
    max_model_len: int | None
    kv_cache_gib: float | None
    compiled: bool
    draft: str | None = None
    draft_tokens: int = 3
    vllm_flags: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    log_format: LogFormat = LogFormat.TEXT
    baseline: str | None = None


def with_stock_folders(settings: ServeSettings) -> ServeSettings:
    """The same settings, with the folder of a GGUF file in the place of the file.

    The model is served under the name that the user gave. A folder's name is served without the slash that may stand
    behind it, and with the slash.

    The baseline keeps the name under which it is shown: its engine looks for the folder itself.

    Raises:
        ModelError: the file is damaged or not covered.
    """
    model = stock_path(settings.model)
    draft = None if settings.draft is None else stock_path(settings.draft)
    flags = settings.vllm_flags
    if model != settings.model:
        # Our flag comes first, so that a name of the user's own wins.
        flags = ("--served-model-name", settings.model, *flags)
    elif Path(model).is_dir() and (name := model.rstrip("/")) not in ("", model) and not _is_named(flags):
        # A shell completes a folder's name with a slash. The server shows the name without the slash, and answers to
        # both.
        flags = ("--served-model-name", name, model, *flags)
    return replace(settings, model=model, draft=draft, vllm_flags=flags)


def _is_named(flags: tuple[str, ...]) -> bool:
    return any(flag.replace("_", "-").startswith("--served-model-name") for flag in flags)


def serve_arguments(settings: ServeSettings, *, on_cpu: bool) -> list[str]:
    """The command line for vLLM; the user's own flags come last, so that they win."""
    arguments = ["--model", settings.model, "--host", settings.host, "--port", str(settings.port)]
    # Where a Mistral's folder also has weights in its authors' own format, vLLM would read params.json in place of
    # config.json.
    arguments += ["--load-format", "safetensors", "--config-format", "hf"]
    if Feature.CHAT_TEMPLATE in settings.policy.allowed:
        arguments.append("--trust-request-chat-template")
    if Feature.PROMPT_EMBEDS in settings.policy.allowed:
        arguments.append("--enable-prompt-embeds")
    arguments += ["--dtype", serving_dtype() if on_cpu and settings.dtype == "auto" else settings.dtype]
    if settings.draft is not None:
        arguments += [
            "--speculative-config",
            json.dumps(speculative_config(settings.draft, settings.draft_tokens)),
        ]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if settings.kv_cache_gib is not None:
        # The variable counts whole GiB and would win over the flag.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        arguments += ["--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * GIB))]
    elif on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        available_gib = available_memory_bytes() / GIB / (1 if settings.baseline is None else 2)
        arguments += ["--kv-cache-memory-bytes", str(int(default_kv_cache_gib(available_gib) * GIB))]
    if settings.baseline is not None and not on_cpu:
        # The share counts all memory of the GPU, and each of the two engines takes it.
        arguments += ["--gpu-memory-utilization", "0.45"]
    if on_cpu and not settings.compiled:
        # Measured on 2 busy cores, float32: a first start takes 160 s compiled and 48 s eager (a second one 88 s and
        # 41 s: vLLM compiles again when its cached graph does not load), and needs a C++ compiler. Decoding a model of
        # 120 M parameters takes 51 ms a token compiled and 58 ms eager (LOG.md).
        arguments.append("--enforce-eager")
    return arguments + list(settings.vllm_flags)


def default_kv_cache_gib(available_gib: float) -> float:
    """Memory for keys and values where the user names none: 4 GiB, but at most a quarter of the free memory.

    vLLM by default takes nine tenths of the machine on a CPU, which a laptop or a shared server does not have.
    """
    return min(DEFAULT_KV_CACHE_GIB, available_gib / 4)
