"""pat-bench load: goodput from known timestamps, errors before anything is sent, and the real guidellm."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from pat_serve.errors import EngineError, UsageError
from pat_serve.server.bench.load.client import set_the_clock_first
from pat_serve.server.bench.load.result import LoadRequest, LoadSettings, load_run, read_guidellm
from pat_serve.server.bench.load.run import check_load, guidellm_environment, look_up, run_load, scenario
from tests.integration.conftest import free_port
from tests.tiny_models import save_tiny_llama


def request(
    ttft_s: float, step_s: float, *, outcome: str = "completed", tokens: int = 5, late_s: float = 0.0
) -> LoadRequest:
    return LoadRequest.model_validate(
        {
            "targeted_s": 1000.0,
            "sent_s": 1000.0 + late_s,
            "first_token_s": 1000.0 + late_s + ttft_s if outcome == "completed" else None,
            "last_token_s": 1000.0 + late_s + ttft_s + (tokens - 1) * step_s if outcome == "completed" else None,
            "output_tokens": tokens,
            "outcome": outcome,
        }
    )


def test_goodput_counts_requests_within_all_bounds() -> None:
    requests = [
        request(0.1, 0.01),
        request(0.1, 0.09),  # too slow between tokens
        request(0.5, 0.01),  # too slow to the first
        request(0.1, 0.0, tokens=1),  # one token has no time between two
        request(0.1, 0.01, outcome="errored"),
        request(0.1, 0.01, outcome="cut_off"),
    ]
    run = load_run(requests, name="x", rate=1.0, duration_s=4.0, slo={"ttft": 0.2, "tpot": 0.05})
    assert (run.completed, run.errored, run.cut_off) == (4, 1, 1)
    assert run.goodput_per_s == pytest.approx(2 / 4)
    assert run.good_share == pytest.approx(2 / 5)
    assert run.requests_per_s == pytest.approx(1.0)
    assert run.output_tokens_per_s == pytest.approx(16 / 4)
    assert run.ttft is not None
    assert run.ttft.max == pytest.approx(0.5)
    assert run.tpot is not None
    assert run.tpot.count == 3
    # The one that was cut off was in flight until the end; nobody knows until when the one that failed was.
    assert run.concurrency == pytest.approx((0.14 + 0.46 + 0.54 + 0.1 + 4.0) / 4)
    unbounded = load_run(requests, name="x", rate=1.0, duration_s=4.0, slo={})
    assert unbounded.good_share is unbounded.goodput_per_s is None


def test_a_client_that_is_late_is_seen() -> None:
    kept = load_run([request(0.1, 0.01)] * 20, name="x", rate=1.0, duration_s=4.0, slo={})
    late = load_run([request(0.1, 0.01, late_s=3.0)] * 20, name="x", rate=1.0, duration_s=4.0, slo={})
    assert kept.kept_schedule
    assert not late.kept_schedule
    assert late.late_s == pytest.approx(3.0)


def test_nothing_but_failures_has_no_latency() -> None:
    run = load_run([request(0.1, 0.1, outcome="errored")] * 3, name="x", rate=1.0, duration_s=1.0, slo={"ttft": 1.0})
    assert run.ttft is run.tpot is run.e2e is None
    assert run.good_share == 0.0


def test_guidellm_s_timestamps_are_read_and_its_averages_are_not() -> None:
    def one(**times: float | None) -> dict[str, Any]:
        every = {
            "targeted_start": 10.0,
            "request_start": 10.1,
            "first_token_iteration": 10.3,
            "last_token_iteration": 10.7,
        }
        return {"info": {"timings": {**every, **times}}, "output_tokens": 5, "time_to_first_token_ms": 999999}

    benchmark = {
        "config": {"strategy": {"type_": "poisson", "rate": 2.0}},
        "duration": 8.0,
        "requests": {
            "successful": [one(), one(first_token_iteration=None)],
            "errored": [],
            "incomplete": [one(), one(request_start=None)],
            "total": None,
        },
    }
    [run] = read_guidellm({"benchmarks": [benchmark]}, {"ttft": 0.25})
    assert run.name == "poisson 2/s"
    # A success without a token is none; what was never sent is nobody's.
    assert (run.completed, run.errored, run.cut_off) == (1, 1, 1)
    assert run.ttft is not None
    assert run.ttft.p50 == pytest.approx(0.2)
    assert run.tpot is not None
    assert run.tpot.p50 == pytest.approx(0.1)
    assert run.late_s == pytest.approx(0.1)
    benchmark["config"] = {"strategy": {"type_": "throughput"}}
    [run] = read_guidellm({"benchmarks": [benchmark]}, {})
    assert run.rate is run.late_s is None


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"url": "localhost:8000"}, "--url"),
        ({"rates": ()}, "--rate"),
        ({"rates": (1.0, 0.0)}, "--rate"),
        ({"rates": (math.inf,)}, "finite"),
        ({"seconds": math.inf}, "--seconds"),
        ({"slo": {"p99": 1.0}}, "--slo p99"),
        ({"slo": {"ttft": -1.0}}, "--slo ttft"),
        ({"seconds": 0.0}, "--seconds"),
        ({"sweep_size": 2}, "--sweep-size"),
    ],
)
def test_senseless_loads_are_refused(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check_load(LoadSettings.model_validate({"url": "http://127.0.0.1:1", **change}))


class Models(BaseHTTPRequestHandler):
    """A list of models for those who have the key; something else elsewhere."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            status, body = 200, b"<html>a web page</html>"
        elif self.headers.get("Authorization") != "Bearer sesame":
            status, body = 401, b"{}"
        else:
            models = [{"id": "first", "root": "/models/first"}, {"id": "second"}]
            status, body = 200, json.dumps({"data": models}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listed() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_model_s_name_comes_from_the_server(listed: str) -> None:
    assert vars(look_up(listed, "", api_key="sesame")) == {"name": "first", "root": "/models/first"}
    assert vars(look_up(listed, "second", api_key="sesame")) == {"name": "second", "root": "second"}
    with pytest.raises(UsageError, match="first, second"):
        look_up(listed, "third", api_key="sesame")


def test_servers_that_cannot_be_asked(listed: str) -> None:
    with pytest.raises(UsageError, match="found no key"):
        look_up(listed, "", api_key=None)
    with pytest.raises(UsageError, match="status 401") as caught:
        look_up(listed, "", api_key="hunter2")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(EngineError, match="a server that answers"):
        look_up(f"http://127.0.0.1:{free_port()}", "", api_key=None)
    with pytest.raises(EngineError, match="a list of models"):
        look_up(f"{listed}/somewhere", "", api_key="sesame")


def test_the_key_travels_in_a_file_of_our_own_and_one_process_sends() -> None:
    plan = scenario(LoadSettings(url="http://x", rates=(1.0, 2.0)), "http://x", "m", "/tok", "sesame")
    assert plan["spec"]["backend"]["api_key"] == "sesame"
    assert plan["spec"]["profile"] == {"kind": "poisson", "rate": [1.0, 2.0]}
    environment = guidellm_environment({"A": "b"}, tokenizer="somebody/model", url="http://127.0.0.1:8000")
    assert environment == {"A": "b", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    assert (
        guidellm_environment({"GUIDELLM__MAX_WORKER_PROCESSES": "3"}, tokenizer="x", url="")[
            "GUIDELLM__MAX_WORKER_PROCESSES"
        ]
        == "3"
    )


@pytest.mark.slow
def test_the_clock_of_poisson_arrivals_is_set_before_a_worker_can_read_it() -> None:
    strategies = pytest.importorskip("guidellm.scheduler.strategies")
    original = strategies.AsyncPoissonStrategy.init_processes_start

    def seen_by_the_first_worker() -> float:
        strategy = strategies.AsyncPoissonStrategy(rate=2.0)
        strategy.init_processes_timings(1, 8, multiprocessing.get_context("spawn"))
        seen: list[float] = []
        strategy._processes_init_event = SimpleNamespace(set=lambda: seen.append(strategy._offset.value))
        strategy.init_processes_start(1e9)
        assert strategy._offset.value == strategy._processes_start_time.value == 1e9
        [first] = seen
        return first

    # Where this is no longer so, guidellm has been mended and the replacement can go.
    assert seen_by_the_first_worker() == -1
    try:
        set_the_clock_first()
        assert seen_by_the_first_worker() == 1e9
    finally:
        strategies.AsyncPoissonStrategy.init_processes_start = original


def test_guidellm_measures_a_server_of_known_latency(tmp_path: Path) -> None:
    """guidellm's own mock server: 100 ms to the first token, 20 ms to each other."""
    port, model = free_port(), save_tiny_llama(tmp_path / "tiny")
    command = [sys.executable, "-m", "guidellm", "mock-server", "--port", str(port), "--model", "fake"]
    command += ["--ttft-ms", "100", "--ttft-ms-std", "0", "--itl-ms", "20", "--itl-ms-std", "0"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        wait_for_models(f"http://127.0.0.1:{port}")
        settings = LoadSettings(
            url=f"http://127.0.0.1:{port}/v1",
            rates=(4.0,),
            seconds=8,
            output_tokens=8,
            tokenizer=str(model),
            slo={"ttft": 0.09, "tpot": 1.0},
        )
        result = run_load(settings, api_key=None)
        (tmp_path / "none").mkdir()
        with pytest.raises(EngineError, match="a report"):
            run_load(settings.model_copy(update={"tokenizer": str(tmp_path / "none")}), api_key=None)
        with pytest.raises(EngineError, match=r"expected a request in every run, found a run of 2 s without one"):
            run_load(settings.model_copy(update={"rates": (1e-4,), "seconds": 2.0}), api_key=None)
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    [run] = result.runs
    assert result.model == "fake"
    # Four a second for eight seconds. A busy machine starts fewer in its time, and says how late they were.
    assert 1 <= run.completed <= 60
    assert run.errored == 0
    assert run.late_s is not None
    assert run.ttft is not None
    assert run.tpot is not None
    # No request can be faster than the server; on a busy machine all are slower, but by no unit.
    assert 0.1 <= run.ttft.p50 < settings.seconds
    assert 0.019 <= run.tpot.p50 < settings.seconds / settings.output_tokens
    assert run.good_share == 0.0


def wait_for_models(url: str) -> None:
    deadline_s = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
