"""Have a vLLM engine in a process of its own judge token ids with a checkpoint; see `pat_serve.scores`."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from pat_serve.checkpoints.locate import read_config
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.scores import ScoreRequest, Scores
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Start
from pat_serve.shapes.sizes import ModelSizes

_BATCH = 4
_STEP_TOKENS = 512
_LEAST_CACHE_BYTES = 1 << 28


def vllm_installed() -> bool:
    """Whether vLLM is installed; nothing is imported."""
    return find_spec("vllm") is not None


def score_with_vllm(request: ScoreRequest) -> Scores:
    """Start an engine, have it judge and continue, and end it.

    Raises:
        MissingExtra: vLLM is not installed.
        EngineError: the engine did not start, or died; the error has the end of its log.
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
    shape = ModelSizes.of(read_config(request.model), source=request.model)
    # vLLM itself refuses a dtype that has no line there.
    token_bytes = shape.kv_values_per_token * DTYPE_BYTES.get(request.dtype, 8)
    return max(_LEAST_CACHE_BYTES, 2 * _BATCH * longest * token_bytes)
