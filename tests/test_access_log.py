"""A line of the access log is one line, and holds nothing that steers a terminal or forges another line."""

from __future__ import annotations

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pat_serve.server.http.access_log import MAX_PATH_CHARS, AccessLog, LogFormat, fields, json_line, text_line
from pat_serve.server.http.exchange import Exchange

PRINTABLE = re.compile(r"[ -~]+")


def exchange(path: str = "/generate", route: str = "/generate") -> Exchange:
    made = Exchange(method="POST", path=path, route=route, request_id="r-1", key="alice", arrival_s=10.0)
    made.status, made.duration_s, made.request_bytes, made.response_bytes = 200, 0.5, 20, 300
    made.work.prompt_tokens, made.work.output_tokens = 4, 3
    made.work.first_token_s, made.work.queue_s = 10.1234567, 0.01
    made.work.decode_s, made.work.decoded_tokens = 0.2, 2
    return made


def test_a_line_of_json() -> None:
    line = json.loads(json_line(fields(exchange())))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "request_id": "r-1", "key": "alice", "method": "POST", "route": "/generate", "status": 200,
        "request_bytes": 20, "response_bytes": 300, "prompt_tokens": 4, "output_tokens": 3,
        "queue_s": 0.01, "ttft_s": 0.123457, "tpot_s": 0.1, "duration_s": 0.5,
    }  # fmt: skip


def test_a_line_of_text() -> None:
    line = text_line(fields(exchange("/no\x1b[31mthing", "other")))
    when, told = line.split(" ", 1)
    assert when.endswith("Z")
    assert told.startswith('POST other 200 request_id=r-1 key=alice path="/no\\x1b[31mthing" request_bytes=20')
    assert told.endswith("queue_s=0.01 ttft_s=0.123457 tpot_s=0.1 duration_s=0.5")


def test_what_there_was_none_of_is_left_out() -> None:
    bare = Exchange(method="GET", path="/health", route="/health", request_id="r")
    assert fields(bare).keys() == {
        "time", "request_id", "key", "method", "route", "status", "request_bytes", "response_bytes", "duration_s"
    }  # fmt: skip


HOSTILE = [
    "\r\n2026-01-01 forged",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u2028",
    "\x7f",
    '" status=200 "',
    "\\x0a",
    "\udc80",
]


@pytest.mark.parametrize("form", [json_line, text_line])
@given(path=st.text(max_size=50) | st.sampled_from(HOSTILE))
def test_no_path_forges_a_line(form, path: str) -> None:
    line = form(fields(exchange("/" + path, "other")))
    assert PRINTABLE.fullmatch(line)
    if form is json_line:
        assert json.loads(line)["status"] == 200
    else:
        # Between the quotes nothing ends them or looks like a field.
        assert len(re.findall(r'path="[^" ]*"', line)) == 1
        assert line.count(" status=") == 0
    assert len(line) < 4 * 60 + 600


def test_a_long_path_is_cut() -> None:
    assert fields(exchange("/" + "a" * 5000, "other"))["path"] == "/" + "a" * (MAX_PATH_CHARS - 1) + "..."


def test_quiet_paths_get_no_line(caplog: pytest.LogCaptureFixture) -> None:
    log = AccessLog(LogFormat.JSON, ["/health"])
    with caplog.at_level(logging.INFO, logger="pat_serve.access"):
        log.write(exchange("/health", "/health"))
        log.write(exchange())
    assert [json.loads(record.message)["route"] for record in caplog.records] == ["/generate"]
