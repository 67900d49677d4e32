"""Replicas on a local Ray cluster of two nodes: what their clients see when a replica, an engine or a node is lost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="needs the ray extra")

from ray import serve

from pat_serve.server.cluster.app import PatServe
from pat_serve.server.cluster.settings import ReplicaSettings
from tests.integration.conftest import HANG_S
from tests.integration.ray_load import Load
from tests.integration.ray_nodes import (
    REQUEST_TIMEOUT_S,
    Nodes,
    direct_url,
    ended,
    engine_of,
    kill,
    servers_of,
    two_nodes,
    until,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def nodes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tiny_model, tmp_path_factory.mktemp("ray")) as nodes:
        print(f"\none replica after {nodes.until_running(1):.0f} s")
        yield nodes


@pytest.fixture
def client(nodes: Nodes) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=nodes.url, timeout=REQUEST_TIMEOUT_S) as client:
        yield client


def check(told: str, load: Load, back_s: float | None = None) -> None:
    print(f"\n{told}: {load.figures()}" + ("" if back_s is None else f"; two replicas again after {back_s:.0f} s"))
    assert (load.ends["hung"], load.broken) == (0, [])
    assert load.ends["answered"]


def test_answers_are_the_servers_own(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a", "max_tokens": 4})
    assert (answer.status_code, answer.json()["finish_reason"]) == (200, "length")
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert client.get("/ready").status_code == 200
    assert client.get("/generate").json()["error"]["type"] == "method_not_allowed"
    refused = client.post("/generate", json={"prompt": "a", "surprise": 1})
    assert (refused.status_code, "an unknown field" in refused.json()["error"]["message"]) == (400, True)
    with client.stream("POST", "/generate", json={"prompt": "a", "max_tokens": 4, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


def test_load_brings_a_second_replica(nodes: Nodes) -> None:
    with Load(nodes.url) as load:
        took_s = nodes.until_running(2)
        load.until_ended(6)
    check(f"a second replica after {took_s:.0f} s of load", load)


def test_a_client_that_leaves_frees_its_place(nodes: Nodes, client: httpx.Client) -> None:
    urls = [direct_url(replica) for replica in nodes.replicas()]

    def in_flight() -> float:
        texts = [httpx.get(f"{url}/metrics", timeout=60).text for url in urls]
        found = [re.search(r"^pat_serve_requests_in_flight (\S+)$", text, re.MULTILINE) for text in texts]
        return sum(float(match[1]) for match in found if match)

    body = {"prompt_token_ids": [5], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with nodes.brake.held():
        with client.stream("POST", "/generate", json=body) as stream:
            # Held on to: the connection ends with the iterator.
            lines = stream.iter_lines()
            first = next(lines)
            assert stream.status_code == 200, first
            assert in_flight() == 1, first
        took_s = until(lambda: in_flight() == 0, "free place", HANG_S)
    print(f"\nthe place of a client that left was free after {took_s:.1f} s")


def test_a_killed_replica(nodes: Nodes) -> None:
    with Load(nodes.url) as load:
        load.until_ended(6)
        victim = nodes.replicas()[0]
        servers = servers_of(victim)
        kill(victim)
        begun_s = time.monotonic()
        # The replica's server, which holds the model in memory, must not outlive the replica.
        until(lambda: ended(*servers), "end of its server", 60)
        until(lambda: nodes.running() < 2, "lost replica", 60)
        nodes.until_running(2)
        back_s = time.monotonic() - begun_s
        load.until_ended(12)
    check("a replica killed with SIGKILL", load, back_s)


def test_a_killed_engine(nodes: Nodes) -> None:
    with Load(nodes.url) as load:
        load.until_ended(6)
        victim = nodes.replicas()[0]
        kill(engine_of(victim))
        begun_s = time.monotonic()
        until(lambda: ended(victim), "end of the replica", 90)
        until(lambda: nodes.running() < 2, "lost replica", 60)
        nodes.until_running(2)
        back_s = time.monotonic() - begun_s
        load.until_ended(12)
    check("an engine killed with SIGKILL", load, back_s)


def test_a_lost_node(nodes: Nodes) -> None:
    with Load(nodes.url) as load:
        load.until_ended(6)
        # A replica whose health check was late has been replaced.
        nodes.until_running(2)
        [victim] = nodes.replicas_of(nodes.second)
        servers = servers_of(victim)
        nodes.lose_second()
        begun_s = time.monotonic()
        until(lambda: ended(victim, *servers), "end of all processes of the node", 90)
        until(lambda: nodes.running() == 1, "lost replica", 120)
        # The other one goes on alone.
        load.until_ended(6)
        nodes.add_second()
        nodes.until_running(2)
        back_s = time.monotonic() - begun_s
        load.until_ended(12)
    check("a node lost", load, back_s)


def test_a_wrong_flag_ends_the_deployment_with_the_servers_own_words(nodes: Nodes, tiny_model: Path) -> None:
    wrong = ReplicaSettings(model=str(tiny_model), flags="--surprise", start_timeout_s=60)
    deployment = PatServe.options(ray_actor_options={"num_cpus": 0})
    with pytest.raises(RuntimeError):
        serve.run(deployment.bind(wrong.model_dump()), name="wrong", route_prefix="/wrong")
    status = serve.status().applications["wrong"]
    assert status.status == "DEPLOY_FAILED"
    assert "--surprise" in status.deployments["PatServe"].message
    serve.delete("wrong")
