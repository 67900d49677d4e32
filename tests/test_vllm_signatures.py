"""vLLM's interfaces that server/engine.py relies on: an upgrade that changes one fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from pat_serve.errors import UsageError
from pat_serve.server.engine import _sampling_params, parse_serve_arguments
from pat_serve.server.generation import Sampling
from pat_serve.server.plugin import PatServePlugin

pytestmark = pytest.mark.vllm


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_server_entry_points() -> None:
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.system_utils import decorate_logs

    assert parameters(decorate_logs) == ["process_name", "skip_if_decorated"]
    assert parameters(setup_server) == ["args", "reuse_port"]
    assert parameters(run_server_worker)[:3] == ["listen_address", "sock", "args"]
    assert inspect.iscoroutinefunction(run_server_worker)


def test_engine_client() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.generate)[1:4] == ["prompt", "sampling_params", "request_id"]
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert parameters(AsyncLLM.shutdown) == ["self", "timeout"]
    assert isinstance(AsyncLLM.errored, property)


def test_requests_of_the_engine_client() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    assert parameters(OutputProcessor.abort_requests) == ["self", "request_ids", "internal"]
    assert "request_states" in inspect.getsource(OutputProcessor.__init__)


def test_tokenizer_of_the_renderer() -> None:
    from vllm.renderers import BaseRenderer, TokenizeParams

    assert parameters(BaseRenderer.tokenize_prompts_async) == ["self", "prompts", "params"]
    assert TokenizeParams(max_total_tokens=None).get_encode_kwargs()["truncation"] is False


def test_token_prompt() -> None:
    from vllm.inputs.engine import tokens_input

    assert tokens_input([1, 2]) == {"type": "token", "prompt_token_ids": [1, 2]}


def test_request_statistics() -> None:
    from vllm.v1.metrics.stats import RequestStateStats

    fields = {field.name for field in dataclasses.fields(RequestStateStats)}
    assert {"queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"} <= fields


def test_exception_tree() -> None:
    from vllm.exceptions import GracefulHTTPError, QueueOverflowError, VLLMClientError, VLLMError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    assert issubclass(VLLMValidationError, VLLMClientError)
    assert issubclass(QueueOverflowError, GracefulHTTPError)
    assert not issubclass(GracefulHTTPError, VLLMClientError)
    assert issubclass(EngineDeadError, VLLMError)
    assert issubclass(EngineGenerateError, VLLMError)
    assert int(QueueOverflowError().http_status) == 503
    assert VLLMValidationError("message", parameter="seed").parameter == "seed"


def test_endpoint_plugin_protocol() -> None:
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    assert isinstance(PatServePlugin(), EndpointPlugin)
    assert parameters(EndpointPlugin.attach_router) == parameters(PatServePlugin.attach_router)
    assert parameters(EndpointPlugin.init_state) == parameters(PatServePlugin.init_state)


def test_sampling_parameters_arrive() -> None:
    sampling = Sampling(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, stop=("x",), seed=3, ignore_eos=True, read_prefix_cache=False
    )
    made = _sampling_params(sampling)
    assert (made.max_tokens, made.temperature, made.top_p, made.top_k) == (5, 0.5, 0.9, 7)
    assert (made.stop, made.seed, made.ignore_eos) == (["x"], 3, True)
    assert made.skip_reading_prefix_cache is True
    assert made.output_kind.name == "DELTA"


def test_arguments_that_the_launcher_sets() -> None:
    flags = "--model m --host 127.0.0.1 --port 1 --dtype float32 --max-model-len 99 --kv-cache-memory-bytes 1000"
    args = parse_serve_arguments([*flags.split(), "--enforce-eager"])
    assert (args.model, args.host, args.port, args.dtype, args.max_model_len) == ("m", "127.0.0.1", 1, "float32", 99)
    assert (args.kv_cache_memory_bytes, args.enforce_eager) == (1000, True)
    assert args.served_model_name is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-num-seqs", "many"], "--max-num-seqs"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
    ],
)
def test_wrong_vllm_flag_is_one_line(flags: list[str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_serve_arguments(["--model", "m", *flags])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
