"""Have a vLLM engine in a process of its own judge token ids with a checkpoint; see `pat_serve.scores`."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from pat_serve.checkpoints.locate import read_config
from pat_serve.machine.extras import require
from pat_serve.scores import ScoreRequest, Scores
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Start

_BATCH = 4
_STEP_TOKENS = 512
_LEAST_CACHE_BYTES = 1 << 28


def vllm_installed() -> bool:
    """Whether there is a vLLM to ask; nothing is imported."""
    return find_spec("vllm") is not None


def score_with_vllm(request: ScoreRequest) -> Scores:
    """Start an engine, ask it, and end it.

    Raises:
        MissingExtra: vLLM is not installed.
        EngineError: the engine did not start, or died; with the end of its log.
    """
    require("vllm", "cpu", "cuda", wanted_by="comparing with vLLM", otherwise="leave vLLM out of the comparison")
    longest = max(map(len, [*request.prompts, *request.continued])) + request.new_tokens
    with (
        tempfile.TemporaryDirectory(prefix="pat-parity-") as scratch,
        EngineProcess("exported model", log=Path(scratch) / "vllm.log", offline=True) as engine,
    ):
        start = Start(
            model=str(request.model),
            dtype=request.dtype,
            load_format="auto",
            batch_size=_BATCH,
            max_model_tokens=longest,
            max_step_tokens=max(longest, _STEP_TOKENS),
            kv_cache_bytes=_cache_bytes(request, longest),
            enforce_eager=True,
            seed=0,
        )
        start_together({engine: start})
        return engine.score(request)


def _cache_bytes(request: ScoreRequest, longest: int) -> int:
    """Twice what the keys and values of one batch take, and never so little that a block does not fit."""
    config = read_config(request.model)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dtype: torch.dtype = getattr(torch, request.dtype)
    token_bytes: int = 2 * config["num_hidden_layers"] * heads * head_dim * dtype.itemsize
    return max(_LEAST_CACHE_BYTES, 2 * _BATCH * longest * token_bytes)
