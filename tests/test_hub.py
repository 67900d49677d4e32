"""Pushing an export: the real huggingface_hub client against a small server that speaks the endpoints it needs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

TOKEN = "hf_thetoken"


@dataclass
class Hub:
    """Requests that a stand-in for the hub received."""

    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refuses_commits: bool = False


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = b""
            while size := int(self.rfile.readline(), 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return chunks
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            return self.answer(
                {"name": "me", "type": "user"} if self.known else {"error": "Invalid token"}, 200 if self.known else 401
            )
        if path == "/api/models/me/pruned":
            siblings = [{"rfilename": name} for name in self.hub.files]
            return self.answer({"id": "me/pruned", "sha": "0" * 40, "siblings": siblings})
        if path.startswith("/api/models/me/pruned/tree/"):
            rows = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.hub.files]
            return self.answer(rows)
        self.hub.unknown.append(f"GET {self.path}")
        return self.answer({"error": "unknown"}, 404)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if not self.known:
            return self.answer({"error": "Invalid token"}, 401)
        if path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/me/pruned", "name": "me/pruned"})
        if path == "/api/models/me/pruned/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": files})
        if path == "/me/pruned.git/info/lfs/objects/batch":
            address = f"http://{self.headers['Host']}/blob/"
            objects = [
                {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": address + item["oid"]}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path == "/api/models/me/pruned/commit/main":
            if self.hub.refuses_commits:
                return self.answer({"error": "You are over your quota"}, 403)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    self.hub.deleted.append(value["path"])
                    del self.hub.files[value["path"]]
            return self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/pruned/commit/1", "commitOid": "1" * 40}
            )
        self.hub.unknown.append(f"POST {self.path}")
        return self.answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[1]
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = content
        self.answer({})


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(endpoint: str, folder: Path, **settings: str) -> dict[str, str]:
    # A token that the person who runs this test may have is none of its business.
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return clean | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf-home")} | settings


def push(endpoint: str, run: Path, out: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = "from pat_serve.cli.export import main; main()"
    return subprocess.run(
        [sys.executable, "-c", command, "--ckpt", str(run), "--out", str(out), "--no-parity",
         "--push-to-hub", "me/pruned", *flags],
        env=environment(endpoint, out.parent, **settings), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_everything_arrives(hub: tuple[Hub, str], finished_run: Path, tmp_path: Path):
    state, endpoint = hub
    state.files = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    done = push(endpoint, finished_run, tmp_path / "out", "--private", HF_TOKEN=TOKEN)
    assert done.returncode == 0, (done.stderr, state.unknown)
    assert f"pushed: {endpoint}/me/pruned/commit/1" in done.stderr
    [created] = state.created
    assert created["name"] == "pruned"
    assert created.get("private") or created.get("visibility") == "private"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert state.files == written | {"notes.txt": b"mine"}
    assert state.deleted == ["model-00001-of-00002.safetensors"]  # of an earlier push


def test_a_hub_that_refuses_is_quoted(hub: tuple[Hub, str], tmp_path: Path):
    state, endpoint = hub
    state.refuses_commits = True
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    script = (
        "import sys; from pathlib import Path; from pat_serve.export.record.hub import push_to_hub\n"
        "push_to_hub(Path(sys.argv[1]), 'me/pruned', private=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        env=environment(endpoint, tmp_path, HF_TOKEN=TOKEN), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert "over your quota" in last
    assert f"The export itself is complete; try again with: hf upload me/pruned {out} ." in last
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected a token of the hub, found none"),
        ({"HF_TOKEN": "hf_wrong"}, "to accept the token, found"),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "found offline mode (HF_HUB_OFFLINE)"),
        ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 within reach"),
    ],
)
def test_what_cannot_be_pushed_is_told_first(
    hub: tuple[Hub, str], settings: dict[str, str], message: str, tmp_path: Path
):
    endpoint = settings.get("HF_ENDPOINT", hub[1])
    rest = {name: value for name, value in settings.items() if name != "HF_ENDPOINT"}
    done = push(endpoint, tmp_path / "run", tmp_path / "out", **rest)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()[-1:]
    assert done.stderr == f"{line}\n"
    assert message in line
    assert "hf_" not in line
    assert not (tmp_path / "out").exists()
