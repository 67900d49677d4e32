"""The server's checks against the model, and what the launcher chooses: no engine needed."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import EngineError, PortInUse, UsageError
from pat_serve.server.engine.serve import parse_serve_arguments
from pat_serve.server.http.keys import collect_keys
from pat_serve.server.http.limits import (
    DEFAULT_MAX_TOKENS,
    LimitError,
    check_benchmark,
    check_vocabulary,
    output_budget,
)
from pat_serve.server.http.policy import Policy
from pat_serve.server.start import launch
from pat_serve.server.start.launch import (
    check_address,
    check_certificate,
    check_plugin,
    prepare_environment,
    warn_if_open,
)
from pat_serve.server.start.settings import (
    ServeSettings,
    default_kv_cache_gib,
    serve_arguments,
    with_stock_folders,
)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "max_model_len", "budget"),
    [(10, 5, 15, 5), (10, None, 15, 5), (14, 1, 15, 1), (10, None, 4096, DEFAULT_MAX_TOKENS)],
)
def test_output_budget(prompt_tokens: int, max_tokens: int | None, max_model_len: int, budget: int) -> None:
    assert output_budget(prompt_tokens, max_tokens, max_model_len=max_model_len, param="prompt") == budget


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "param"),
    [(15, None, "prompt"), (15, 1, "prompt"), (99, None, "prompt"), (10, 6, "max_tokens")],
)
def test_output_budget_refuses_what_does_not_fit(prompt_tokens: int, max_tokens: int | None, param: str) -> None:
    with pytest.raises(LimitError) as caught:
        output_budget(prompt_tokens, max_tokens, max_model_len=15, param="prompt")
    assert caught.value.param == param
    assert f"{prompt_tokens} " in str(caught.value)
    assert "this server takes 15" in str(caught.value)


def test_check_vocabulary() -> None:
    check_vocabulary([0, 9], vocab_size=10, param="prompt_token_ids")
    for wrong in ([0, 10], [0, -1]):
        with pytest.raises(LimitError, match=f"token id {wrong[1]} at position 1.*0 to 9"):
            check_vocabulary(wrong, vocab_size=10, param="prompt_token_ids")


def test_check_benchmark() -> None:
    check_benchmark(10, 5, at_once=256, max_model_len=15)
    with pytest.raises(LimitError, match="16 together"):
        check_benchmark(10, 6, at_once=1, max_model_len=15)
    with pytest.raises(LimitError, match="256 prompts of 131071 tokens"):
        check_benchmark(131_071, 1, at_once=256, max_model_len=131_072)


def test_default_kv_cache_leaves_memory_to_others() -> None:
    assert default_kv_cache_gib(64.0) == 4.0
    assert default_kv_cache_gib(8.0) == 2.0


def test_environment_adds_the_plugin_and_keeps_what_is_set() -> None:
    environment = {"VLLM_PLUGINS": "mine", "DO_NOT_TRACK": "0"}
    prepare_environment(environment)
    prepare_environment(environment)
    added = {"VLLM_MAX_STOP_STRINGS": "16", "VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75"}
    assert environment == {"VLLM_PLUGINS": "mine,pat_serve", "DO_NOT_TRACK": "0"} | added


def test_a_keep_alive_of_the_users_stays() -> None:
    environment = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5"}
    prepare_environment(environment)
    assert environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "5"


def settings(**changes: Any) -> ServeSettings:
    plain = ServeSettings(
        model="m",
        host="127.0.0.1",
        port=8000,
        dtype="float32",
        max_model_len=None,
        kv_cache_gib=None,
        compiled=False,
    )
    return replace(plain, **changes)


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_serve_arguments_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    arguments = serve_arguments(settings(vllm_flags=("--max-num-seqs", "8")), on_cpu=True)
    assert 0 < int(value(arguments, "--kv-cache-memory-bytes")) <= 4 * 2**30
    assert "--enforce-eager" in arguments
    assert arguments[-2:] == ["--max-num-seqs", "8"]
    assert "--enforce-eager" not in serve_arguments(settings(compiled=True), on_cpu=True)


def test_kv_cache_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert "--kv-cache-memory-bytes" not in serve_arguments(settings(), on_cpu=True)
    arguments = serve_arguments(settings(kv_cache_gib=0.5), on_cpu=True)
    assert value(arguments, "--kv-cache-memory-bytes") == str(2**29)


def test_serve_arguments_elsewhere_leave_the_choices_to_vllm() -> None:
    arguments = serve_arguments(settings(dtype="auto", max_model_len=99), on_cpu=False)
    assert value(arguments, "--dtype") == "auto"
    assert value(arguments, "--max-model-len") == "99"
    assert not {"--kv-cache-memory-bytes", "--enforce-eager"} & set(arguments)


def test_auto_dtype_on_cpu_is_one_that_it_computes() -> None:
    assert value(serve_arguments(settings(dtype="auto"), on_cpu=True), "--dtype") in {"float32", "bfloat16"}


def test_address_in_use_and_foreign_address() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}.*in use"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    # 192.0.2.0/24 is for documentation, so it is nobody's own address.
    with pytest.raises(PortInUse, match=r"192\.0\.2\.1"):
        check_address("192.0.2.1", port)


@pytest.mark.parametrize(("host", "open_to_others"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)])
def test_a_server_that_is_open_to_others_says_so(
    host: str, open_to_others: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_open(host, Policy(keys=collect_keys(["secret"], environment={})))
    assert capsys.readouterr().err == ""
    warn_if_open(host, Policy())
    told = capsys.readouterr().err
    assert told.startswith(f"pat-serve: warning: --host {host} without API keys") == open_to_others
    assert told.count("\n") == open_to_others


def test_a_bad_certificate_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    check_certificate(None, None)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    with pytest.raises(UsageError, match=r"cert\.pem"):
        check_certificate(str(certificate), str(key))
    for path in (certificate, key):
        path.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(UsageError, match="ssl-keyfile"):
        check_certificate(str(certificate), str(key))
    with pytest.raises(UsageError):
        check_certificate(None, str(key))


def test_without_its_plugin_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plugin()
    monkeypatch.setattr(launch, "entry_points", lambda **_: [])
    with pytest.raises(EngineError, match="entry point"):
        check_plugin()


def test_a_folder_is_served_by_its_name_without_the_slash(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    name = str(tmp_path / "pruned")
    served = with_stock_folders(settings(model=f"{name}/", vllm_flags=("--max-num-seqs", "2")))
    args = parse_serve_arguments(serve_arguments(served, on_cpu=True))
    assert (args.served_model_name, args.model, args.max_num_seqs) == ([name, f"{name}/"], f"{name}/", 2)
    own = ("--served-model-name", "mine")
    assert with_stock_folders(settings(model=f"{name}/", vllm_flags=own)).vllm_flags == own
    for plain in (name, "owner/name"):
        assert with_stock_folders(settings(model=plain)).vllm_flags == ()
