"""With a proxy in the environment, requests to this machine still go to this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import requests

from pat_serve.errors import EngineError, UsageError
from pat_serve.evaluation.backends import served_model
from pat_serve.machine.local_addresses import is_local, keep_local_addresses_direct
from pat_serve.server.bench.load.run import guidellm_environment, look_up, tokenizer_place

ROOT = Path(__file__).parent.parent


@dataclass
class Web:
    """A server on this machine, a proxy that refuses everything, and what reached either."""

    url: str
    proxy: str
    direct: list[str] = field(default_factory=list)
    proxied: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"http_proxy": self.proxy, "HTTP_PROXY": self.proxy, "ALL_PROXY": self.proxy, "no_proxy": "example.org"}


@pytest.fixture
def web() -> Iterator[Web]:
    models = json.dumps({"data": [{"id": "pruned", "root": "pruned/"}]}).encode()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.direct.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models)

        def log_message(self, *_: object) -> None: ...

    class Proxy(Server):
        def do_GET(self) -> None:
            web.proxied.append(self.path)
            self.send_error(403)

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Server, Proxy)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    web = Web(*(f"http://127.0.0.1:{server.server_address[1]}" for server in servers))
    yield web
    for server in servers:
        server.shutdown()
        server.server_close()


def clear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_every_client_goes_straight_to_this_machine(host: str, web: Web, monkeypatch: pytest.MonkeyPatch):
    clear(monkeypatch)
    for name, value in web.environment.items():
        monkeypatch.setenv(name, value)
    url = web.url.replace("127.0.0.1", host)
    assert httpx.get(url).status_code == 403
    keep_local_addresses_direct(os.environ)
    assert httpx.get(url).status_code == 200
    assert requests.get(url, timeout=10).status_code == 200
    assert urllib.request.urlopen(url, timeout=10).status == 200
    assert (len(web.direct), len(web.proxied)) == (3, 1)
    # The world outside does go through it.
    assert httpx.get("http://elsewhere.invalid/").status_code == 403


def test_what_the_user_has_set_stays():
    environment = {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intern.example, 10.0.0.1"}
    keep_local_addresses_direct(environment)
    direct = "intern.example,10.0.0.1,localhost,127.0.0.1,::1,0.0.0.0"
    assert environment["no_proxy"] == environment["NO_PROXY"] == direct
    keep_local_addresses_direct(environment)
    assert environment["no_proxy"] == direct
    for untouched in ({}, {"NO_PROXY": "a"}, {"http_proxy": "http://proxy:3128", "no_proxy": "*"}):
        before = dict(untouched)
        keep_local_addresses_direct(untouched)
        assert untouched == before


def test_the_images_health_check(web: Web):
    command = [sys.executable, str(ROOT / "docker/ready.py")]
    environment = os.environ | web.environment | {"PORT": web.url.rpartition(":")[2]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (web.direct, web.proxied) == (["/ready"], [])


# httpx does not know this kind, or only with another package; desktops write such proxies for all addresses.
SOCKS = ["socks://127.0.0.1:9", "socks5://127.0.0.1:9"]


@pytest.mark.parametrize("proxy", ["http", *SOCKS])
def test_a_command_with_a_proxy_around_it(proxy: str, web: Web, tmp_path: Path):
    """pat-bench load asks the server, and finds that its folder is not here."""
    script = "from pat_serve.cli.bench import main; main()"
    command = [sys.executable, "-c", script, "load", "--url", web.url, "--seconds", "1"]
    proxies = web.environment if proxy == "http" else {"ALL_PROXY": proxy, "all_proxy": proxy}
    environment = os.environ | proxies | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "--tokenizer: expected the folder or hub id of the server's tokenizer, found pruned/" in done.stderr
    assert (web.direct, web.proxied) == (["/v1/models"], [])


@pytest.mark.parametrize("proxy", SOCKS)
def test_a_proxy_that_httpx_cannot_use(proxy: str, web: Web, monkeypatch: pytest.MonkeyPatch):
    clear(monkeypatch)
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert look_up(web.url, "", api_key=None).name == "pruned"
    assert served_model(web.url, {})["root"] == "pruned/"
    assert web.direct == ["/v1/models"] * 2
    for ask in (lambda url: look_up(url, "", api_key=None), lambda url: served_model(url, {})):
        with pytest.raises(EngineError, match=r"http://elsewhere.invalid.*(socksio|scheme)"):
            ask("http://elsewhere.invalid")
    for local in ("http://[::1]:8000", "http://localhost", "HTTP://LOCALHOST:1/v1"):
        assert is_local(local)
    for remote in ("http://elsewhere.invalid", "http://[", "127.0.0.1", ""):
        assert not is_local(remote)
    environment = guidellm_environment(os.environ, tokenizer=os.curdir, url=web.url)
    assert "ALL_PROXY" not in environment
    assert guidellm_environment(os.environ, tokenizer=os.curdir, url="http://elsewhere.invalid")["ALL_PROXY"] == proxy


def test_a_tokenizer_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """guidellm runs in a folder of its own, and would take `pruned/` for a hub id."""
    (tmp_path / "pruned").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("pruned", "pruned/", "./pruned", str(tmp_path / "pruned")):
        assert tokenizer_place(name) == str(tmp_path / "pruned")
    assert tokenizer_place("owner/name") == "owner/name"
    for name in ("gone/", "./gone", "/gone", "~/gone"):
        with pytest.raises(UsageError, match=r"--tokenizer: .* no such folder here"):
            tokenizer_place(name)
