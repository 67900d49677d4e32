"""The page's files, served without an engine."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from pat_serve.server.http.admission import Admission
from pat_serve.server.http.body_check import ModelBounds
from pat_serve.server.http.errors import HttpError
from pat_serve.server.http.front import Front, Gate, authorize
from pat_serve.server.http.keys import collect_keys
from pat_serve.server.http.policy import Policy
from pat_serve.server.http.web_page import PAGE_PATHS, page_router, read_card
from pat_serve.server.routes.plugin import OWN_ROUTES

WEB = Path(__file__).parent.parent / "server" / "web"


def page(*, public: bool, keys: tuple[str, ...] = ("me=secret",)) -> TestClient:
    app = FastAPI()
    app.add_middleware(Front)
    app.include_router(page_router())
    policy = Policy(public_page=public, keys=collect_keys(keys, environment={}))
    app.state.pat_serve_gate = Gate(
        policy, Admission(capacity=1), ModelBounds(max_model_len=9, vocab_size=9), OWN_ROUTES
    )
    return TestClient(app)


def test_files_are_whole_typed_and_may_do_nothing_from_elsewhere() -> None:
    client = page(public=True)
    for path in PAGE_PATHS - {"/page/access"}:
        answer = client.get(path)
        name = path.removeprefix("/page/") if path != "/" else "index.html"
        assert answer.content == (WEB / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert client.head(path).headers["content-type"] == answer.headers["content-type"]
    assert client.get("/page/app.js").headers["content-type"].startswith("text/javascript")
    assert {path.suffix for path in WEB.iterdir()} == {".html", ".css", ".js", ".md", ".svg"}


def test_the_page_says_what_to_serve_in_the_documents_words() -> None:
    document = (WEB.parents[1] / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    chapter = document.partition("\n## What to serve when\n")[2].partition("\n## ")[0]
    shown = (WEB / "what_to_serve.md").read_text(encoding="utf-8")
    assert shown.strip()
    assert shown.strip() == chapter.strip()


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_with_keys_the_files_ask_for_one_unless_the_flag_opens_them(path: str) -> None:
    closed = page(public=False)
    assert closed.get(path).status_code == 401
    assert closed.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert page(public=True).get(path).status_code == 200
    assert page(public=False, keys=()).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/page", "/page/", "/page/model", "/page/../page/app.js", "//", "/page/app.js/", ""])
def test_the_flag_opens_these_files_to_the_letter(path: str) -> None:
    policy = Policy(public_page=True, keys=collect_keys(["secret"], environment={}))
    assert authorize({"path": "/page/app.js", "headers": []}, policy) == "none"
    with pytest.raises(HttpError, match="wants an API key"):
        authorize({"path": path, "headers": []}, policy)


def test_the_page_is_told_whether_a_key_is_needed_and_nothing_else() -> None:
    assert page(public=True).get("/page/access").json() == {"key_needed": True}
    assert page(public=True, keys=()).get("/page/access").json() == {"key_needed": False}


class Checker(HTMLParser):
    """Collects what the policy forbids, and what a label or a link needs."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: set[str] = set()
        self.fields: list[str] = []
        self.inline: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        self.ids += [str(given["id"])] if "id" in given else []
        self.links += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "label":
            self.labels.add(str(given["for"]))
        if tag in ("input", "textarea", "select"):
            self.fields.append(str(given["id"]))
        self._in_script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)


def test_markup_needs_nothing_that_the_policy_forbids() -> None:
    checker = Checker()
    checker.feed((WEB / "index.html").read_text(encoding="utf-8"))
    assert checker.inline == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.fields) <= checker.labels
    for link in checker.links:
        assert link in PAGE_PATHS or link.removeprefix("#") in checker.ids, link


def test_scripts_make_no_markup_of_text_and_load_nothing_from_elsewhere() -> None:
    ids = set(re.findall(r'id="([^"]+)"', (WEB / "index.html").read_text(encoding="utf-8")))
    for path in WEB.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert set(re.findall(r'from "([^"]+)"', text)) <= PAGE_PATHS
        assert set(re.findall(r"\$\(\"([^\"]+)\"\)", text)) <= ids, path
    for path in WEB.iterdir():
        outside = re.findall(r"https?://[^\"' )]+", path.read_text(encoding="utf-8"))
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, path


def test_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_card(str(tmp_path)) is None
    (tmp_path / "README.md").write_bytes("# Ümlaut \xff".encode("latin-1"))
    card = read_card(str(tmp_path))
    assert card is not None
    assert card.startswith("# ")
    assert read_card(str(tmp_path / "none")) is None
