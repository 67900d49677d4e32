"""API keys and the front's door, without an engine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import UsageError
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.front import authorize
from pat_serve.server.http.keys import KeyRing, collect_keys
from pat_serve.server.http.policy import Policy


def test_keys_come_from_flags_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\n\nteam=from-file\n")
    environment = {"PAT_SERVE_API_KEYS": "one, dave=two", "VLLM_API_KEY": "three", "OTHER": "kept"}
    ring = collect_keys(["alice=secret", "bare"], environment=environment, file=file)
    owners = {
        key: ring.owner(f"Bearer {key}".encode()) for key in ("secret", "bare", "one", "two", "from-file", "three")
    }
    assert owners == {
        "secret": "alice", "bare": "key-2", "one": "key-3", "two": "dave", "from-file": "team", "three": "key-6",
    }  # fmt: skip
    # No child process inherits them.
    assert environment == {"OTHER": "kept"}


def test_vllms_variable_is_one_key_whatever_is_in_it() -> None:
    environment = {"VLLM_API_KEY": "team=secret,more"}
    ring = collect_keys([], environment=environment)
    assert ring.owner(b"Bearer team=secret,more") == "key-1"
    assert ring.owner(b"Bearer secret,more") is None
    assert environment == {}


@pytest.mark.parametrize(
    ("flags", "environment", "told"),
    [
        ([""], {}, "--api-key"),
        (["a", " "], {}, "--api-key"),
        ([], {"PAT_SERVE_API_KEYS": ""}, "PAT_SERVE_API_KEYS"),
        (["a"], {"PAT_SERVE_API_KEYS": " , "}, "PAT_SERVE_API_KEYS"),
        ([], {"VLLM_API_KEY": ""}, "VLLM_API_KEY"),
    ],
)
def test_a_source_without_a_key_does_not_open_the_server(
    flags: list[str], environment: dict[str, str], told: str
) -> None:
    with pytest.raises(UsageError, match=f"^{told}: expected a key, found nothing"):
        collect_keys(flags, environment=environment)


def test_nothing_of_a_key_is_kept_but_its_digest() -> None:
    ring = collect_keys(["alice=secret"], environment={})
    assert "secret" not in repr(ring)
    assert ring.keys[0].digest == hashlib.sha256(b"secret").digest()


@pytest.mark.parametrize("key", ["c2VjcmV0a2V5==", "c2VjcmV0a2V=", "with=inside-9=", "ünïcode"])
def test_a_key_may_end_in_padding_and_hold_any_letters(key: str) -> None:
    name = "with" if key.startswith("with") else "key-1"
    secret = key.removeprefix("with=")
    assert collect_keys([key], environment={}).owner(f"Bearer {secret}".encode()) == name


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer third",
        b"first",
        b"Basic first",
        b"Bearer first second",
        b"Bearer \xff",
    ],
)
def test_what_is_not_a_key(authorization: bytes | None) -> None:
    assert collect_keys(["first", "second"], environment={}).owner(authorization) is None
    assert KeyRing().owner(authorization) is None


def test_scheme_is_case_insensitive() -> None:
    assert collect_keys(["first"], environment={}).owner(b"bEARER first") == "key-1"


@pytest.mark.parametrize("flags", [["a b"], ["name=a\tb"], ["x=1", "x=2"]])
def test_a_key_that_cannot_be_used_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        collect_keys(flags, environment={})
    assert not any(part in str(caught.value) for part in ("a b", "a\tb"))


@pytest.mark.parametrize("text", [None, "", "# nothing\n", b"\xff\xfe"])
def test_a_key_file_without_keys_is_refused(tmp_path: Path, text: str | bytes | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError, match="api-key-file"):
        collect_keys([], environment={}, file=file)


def scope(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "root_path": ""} | more


POLICY = Policy(keys=collect_keys(["alice=secret"], environment={}))


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "//health", "/health/", "/health/../generate", "/ready//", "/Health", "/health%2f", "/health\x00",
        "/metrics", "/v1/models", "//v1/models", "/v1/health", "/docs", "/openapi.json", "/invocations", "/ping",
    ],
)  # fmt: skip
def test_every_path_but_the_probes_wants_the_key(path: str) -> None:
    for extra in (
        {},
        {"root_path": "/health"},
        {"headers": [(b"host", b"localhost/health"), (b"x-forwarded-for", b"::1")]},
    ):
        with pytest.raises(HttpError) as caught:
            authorize(scope(path, **extra), POLICY)
        assert caught.value.status == 401
        assert caught.value.headers["WWW-Authenticate"] == "Bearer"
    assert authorize(scope(path, headers=[(b"authorization", b"Bearer secret")]), POLICY) == "alice"


def test_open_paths() -> None:
    for path in ("/health", "/ready"):
        authorize(scope(path), POLICY)
    authorize(scope("/metrics"), Policy(keys=POLICY.keys, public_metrics=True))
    authorize(scope("/v1/models"), Policy())
