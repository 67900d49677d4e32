"""vLLM's interfaces that server/engine/ relies on: an upgrade that changes one fails here, by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pat_serve.errors import EngineError, UsageError
from pat_serve.server.engine.generation import Sampling
from pat_serve.server.engine.online import _sampling_params
from pat_serve.server.engine.patches import engine_faults
from pat_serve.server.engine.serve import is_cpu_backend, parse_serve_arguments
from pat_serve.server.http.policy import Feature, Policy
from pat_serve.server.http.served_routes import VLLMS, keep_served
from pat_serve.server.routes.plugin import PatServePlugin
from pat_serve.server.start.handover import Handover
from pat_serve.server.start.launch import check_flags, uvicorn_options
from pat_serve.server.start.settings import ServeSettings, serve_arguments

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


def test_outputs_of_the_engine_client() -> None:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    assert parameters(OutputProcessor.process_outputs)[1] == "engine_core_outputs"
    assert {"request_id", "new_token_ids", "finish_reason"} <= set(EngineCoreOutput.__struct_fields__)
    added = ["self", "request", "prompt", "parent_req", "request_index", "queue"]
    assert parameters(OutputProcessor.add_request) == added
    # Looked up anew for each batch, so that it can be wrapped while the engine runs.
    assert "output_processor.process_outputs(" in inspect.getsource(AsyncLLM._run_output_handler)


def test_second_engine() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    assert {"stat_loggers", "disable_log_stats"} <= set(parameters(AsyncLLM.from_vllm_config))
    assert {"args"} <= set(parameters(AsyncEngineArgs.from_cli_args))
    assert "usage_context" in parameters(AsyncEngineArgs.create_engine_config)
    # Why the second engine has a silent one: another would unregister the first engine's metrics.
    assert "unregister_vllm_metrics()" in inspect.getsource(PrometheusStatLogger.__init__)
    assert "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager.__init__)


def test_uvicorn_is_told_by_us() -> None:
    import uvicorn
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker

    told = uvicorn_options(Handover(policy=Policy()))
    assert inspect.signature(run_server_worker).parameters["uvicorn_kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert told.keys() <= inspect.signature(uvicorn.Config).parameters.keys()
    for method in ("on_message_begin", "on_headers_complete", "timeout_keep_alive_handler", "pause_writing"):
        assert method in vars(told["http"].__mro__[2])


def test_tokenizer_of_the_renderer() -> None:
    from vllm.renderers import BaseRenderer, TokenizeParams

    assert parameters(BaseRenderer.tokenize_prompts_async) == ["self", "prompts", "params"]
    assert TokenizeParams(max_total_tokens=None).get_encode_kwargs()["truncation"] is False


def test_token_prompt() -> None:
    from vllm.inputs.engine import tokens_input

    assert tokens_input([1, 2]) == {"type": "token", "prompt_token_ids": [1, 2]}


def test_products_of_an_engine_in_this_process() -> None:
    from vllm import LLM
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    assert parameters(LLM.apply_model) == ["self", "func"]
    assert {"input_size", "output_size"} <= set(parameters(LinearBase.__init__))
    assert {"num_embeddings", "embedding_dim"} <= set(parameters(ParallelLMHead.__init__))
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        assert parameters(method.apply)[:3] == ["self", "layer", "x"]


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
    assert set(engine_faults()) == {EngineDeadError, EngineGenerateError}
    assert int(QueueOverflowError().http_status) == 503
    assert VLLMValidationError("message", parameter="seed").parameter == "seed"


def test_endpoint_plugin_protocol() -> None:
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    assert isinstance(PatServePlugin(), EndpointPlugin)
    assert parameters(EndpointPlugin.attach_router) == parameters(PatServePlugin.attach_router)
    assert parameters(EndpointPlugin.init_state) == parameters(PatServePlugin.init_state)


def test_served_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM adds every route that it can be told to add, and the list of served routes decides on each."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    args = parse_serve_arguments(["--model", "m", "--enable-tokenizer-info-endpoint", "--enable-offline-docs"])
    app = build_app(args, ("generate",))
    steering = {"/pause", "/collective_rpc", "/update_weights", "/abort_requests", "/adapters", "/generative_scoring"}
    offline = {"/static", "/docs", "/docs/oauth2-redirect"}
    assert steering <= {getattr(route, "path", "") for route in app.routes}
    keep_served(app)
    assert {getattr(route, "path", "") for route in app.routes} | offline | {"/redoc"} == VLLMS


def test_vllm_without_a_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for GPUs on a machine without one chooses this platform, and would raise from the parser."""
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr(vllm.platforms, "_current_platform", UnspecifiedPlatform())
    with pytest.raises(EngineError, match=r"vLLM 0\.32\.\S+: expected a device of the kind .*docker run --gpus all"):
        is_cpu_backend()


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
    assert parse_serve_arguments(["--model", "m", "--load-format", "SAFETENSORS"]).load_format == "safetensors"


SETTINGS = ServeSettings(
    model="m", host="127.0.0.1", port=1, dtype="float32", max_model_len=None, kv_cache_gib=None, compiled=False
)
PLAIN = ["--model", "m", "--host", "127.0.0.1", "--port", "1", "--load-format", "safetensors"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--headless"],
        ["--api-server-count", "2"],
        ["--uds", "/run/x"],
        ["--trust-remote-code"],
        ["--load-format", "pt"],
        ["--load-format", "auto"],
        ["--load-format", "PT"],
        ["--port", "2"],
        ["--host", "0.0.0.0"],
    ],
)
def test_flags_that_would_be_ignored_or_undo_a_promise_are_refused(flags: list[str]) -> None:
    check_flags(parse_serve_arguments(PLAIN), SETTINGS)
    with pytest.raises(UsageError, match=flags[0]):
        check_flags(parse_serve_arguments([*PLAIN, *flags]), SETTINGS)


def test_a_draft_is_read_as_its_target_is() -> None:
    draft: dict[str, Any] = {"model": "d", "num_speculative_tokens": 3}
    check_flags(parse_serve_arguments([*PLAIN, "--speculative-config", json.dumps(draft)]), SETTINGS)
    draft["draft_load_config"] = {"load_format": "pt"}
    with pytest.raises(UsageError, match="draft_load_config"):
        check_flags(parse_serve_arguments([*PLAIN, "--speculative-config", json.dumps(draft)]), SETTINGS)


def test_features_that_are_allowed_are_told_to_vllm() -> None:
    plain = parse_serve_arguments(serve_arguments(SETTINGS, on_cpu=False))
    assert (plain.trust_request_chat_template, plain.enable_prompt_embeds) == (False, False)
    assert (plain.load_format, plain.shutdown_timeout) == ("safetensors", 0)
    policy = Policy(allowed=frozenset({Feature.CHAT_TEMPLATE, Feature.PROMPT_EMBEDS}))
    args = parse_serve_arguments(serve_arguments(replace(SETTINGS, policy=policy), on_cpu=False))
    assert (args.trust_request_chat_template, args.enable_prompt_embeds) == (True, True)


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
