"""A Ray cluster of two nodes on this machine with the application on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray import serve
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from tests.integration.brake import Brake
from tests.integration.conftest import free_port

ROOT = Path(__file__).parents[2]
APPLICATION = "pat-serve"
# Replicas start in 30 to 90 s each on two slow cores, more when two start at once beside a load.
START_TIMEOUT_S = 400.0
REQUEST_TIMEOUT_S = 240.0
# Longer than anything that the server or Ray Serve allows a request: what takes longer hangs.
HANG_S = REQUEST_TIMEOUT_S + 60
FLAGS = "--dtype float32 --kv-cache-gib 0.02 --max-model-len 4096 --shutdown-timeout 20 --request-timeout 200"


class Nodes:
    """The cluster: a head with the HTTP proxy, and a second node; each has room for one replica. One brake for all."""

    def __init__(self, cluster: Cluster, url: str, brake: Brake) -> None:
        self.cluster = cluster
        self.url = url
        self.brake = brake
        self.add_second()

    def lose_second(self) -> None:
        """Kill everything of the second node."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def add_second(self) -> None:
        """Add a node in its place."""
        self.second = add_node(self.cluster)

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes, whatever they are doing."""
        return [process for process in psutil.process_iter() if _is_replica(process)]

    def replicas_of(self, node: Any) -> list[psutil.Process]:
        """Replicas of one node: the children of its raylet."""
        [raylet] = node.all_processes["raylet"]
        return [process for process in self.replicas() if process.ppid() == raylet.process.pid]

    def running(self) -> int:
        """The number of replicas that take requests."""
        application = serve.status().applications.get(APPLICATION)
        states = application.deployments["PatServe"].replica_states if application and application.deployments else {}
        return int(states.get("RUNNING", 0))

    def until_running(self, replicas: int) -> float:
        """Wait for that many; returns the seconds."""
        return until(lambda: self.running() == replicas, f"{replicas} replicas that run", START_TIMEOUT_S)


def node_arguments() -> dict[str, Any]:
    """Arguments of a node with room for one replica, on the loopback address."""
    return {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_log_monitor": False, "no_monitor": True}


def add_node(cluster: Cluster, **arguments: Any) -> Any:
    """Add a node; a raylet gives its agents 15 s, which they need on a busy machine, and then gives up."""
    before = set(cluster.worker_nodes)
    for left in reversed(range(4)):
        try:
            return cluster.add_node(**node_arguments(), **arguments)
        except Exception:
            # One that came too late would be a third.
            for late in set(cluster.worker_nodes) - before:
                cluster.remove_node(late, allow_graceful=False)
            if not left:
                raise
    return None


def until(done: Callable[[], bool], told: str, within_s: float) -> float:
    begun_s = time.monotonic()
    while not done():
        assert time.monotonic() < begun_s + within_s, f"no {told} within {within_s:g} s: {serve.status()}"
        time.sleep(0.25)  # the pace of polling
    return time.monotonic() - begun_s


def servers_of(replica: psutil.Process) -> list[psutil.Process]:
    """pat-serve's processes behind a replica: supervisor, server, engine, worker."""
    return replica.children(recursive=True)


def ended(*processes: psutil.Process) -> bool:
    """Whether all have; a zombie has, and waits for its parent."""

    def alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(alive(process) for process in processes)


def engine_of(replica: psutil.Process) -> psutil.Process:
    [engine] = [process for process in servers_of(replica) if "EngineCore" in process.name() + str(process.cmdline())]
    return engine


def direct_url(replica: psutil.Process) -> str:
    """Where a replica's own server listens."""
    for process in servers_of(replica):
        words = process.cmdline()
        if "--port" in words:
            return f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    raise AssertionError(f"no server below {replica}")


def _is_replica(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "ServeReplica:pat-serve:PatServe" in " ".join(
            process.cmdline()
        )
    except psutil.NoSuchProcess:
        return False


def configuration(model: Path, port: int) -> dict[str, Any]:
    """deploy/serve_config.yaml with another model, and small numbers."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/serve_config.yaml").read_text())
    # Two proxies on one machine would want the same port.
    config["proxy_location"] = "HeadOnly"
    config["http_options"] |= {"port": port, "request_timeout_s": REQUEST_TIMEOUT_S}
    [application] = config["applications"]
    application["args"] |= {"model": str(model), "flags": f"{FLAGS} -- --max-num-seqs 8", "start_timeout_s": 390}
    [deployment] = application["deployments"]
    deployment["max_ongoing_requests"] = 8
    deployment["ray_actor_options"] = {"num_cpus": 1}
    deployment["autoscaling_config"] |= {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    return config


@contextmanager
def two_nodes(model: Path, folder: Path) -> Iterator[Nodes]:
    """Start the nodes, and the application with `serve run`."""
    environment = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pat_serve.server.cluster.proxy:middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray gives its workers, and so the servers, the priority of nice 15.
        "RAY_worker_niceness": "0",
        # Else Ray takes the machine's own address for its agents, even where it is told 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Nobody else reaches it, and a token would be written to the user's home.
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    brake = Brake(folder / "brake")
    # The plugin, and these sources.
    environment |= brake.environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    # Read when ray was imported.
    ray_constants.ENABLE_RAY_CLUSTER = False
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    # Ray makes sockets in it, whose paths must be short.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    cluster = Cluster(shutdown_at_exit=True)
    try:
        add_node(cluster, include_dashboard=False, temp_dir=temporary)
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        port = free_port()
        nodes = Nodes(cluster, f"http://127.0.0.1:{port}", brake)
        config = folder / "serve_config.yaml"
        config.write_text(yaml.safe_dump(configuration(model, port)))
        command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(config)]
        subprocess.run([*command, "--address", cluster.address], check=True, timeout=120)
        yield nodes
    finally:
        # Without a cluster to talk to, Ray would start one.
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        cluster.shutdown()
        if Path(temporary, "session_latest").exists():
            shutil.copytree(f"{temporary}/session_latest/logs", folder / "logs", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
