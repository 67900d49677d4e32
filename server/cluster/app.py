"""The Ray Serve application: replicas of pat-serve. No other file imports ray.

serve run pat_serve.server.cluster.app:build model=/models/pruned
serve run deploy/serve_config.yaml
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pat_serve.errors import MissingExtra
from pat_serve.server.cluster.replica_server import ReplicaServer
from pat_serve.server.cluster.settings import ReplicaSettings, read_settings

try:
    from ray import serve
except ImportError as error:
    raise MissingExtra(
        "pat_serve.server.cluster.app",
        expected="the package of the ray extra",
        found="no module ray",
        fix='Install it on every node: pip install "pat-serve[ray]".',
    ) from error

# Ray Serve logs to files by this name.
logger = logging.getLogger("ray.serve")

# Seconds between the server's end and the replica's, in which the answers to waiting clients leave.
_LAST_ANSWERS_S = 1.0


class _Relayed(Response):
    """An answer that another ASGI application gives."""

    def __init__(self, server: ReplicaServer) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the other application's answer."""
        await self._server.relay(scope, receive, send)


class Replica:
    """A replica: a pat-serve process of its own, and the relay to it.

    Args:
        settings: fields of `ReplicaSettings`, checked by `build`.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._stopping = False
        # Ray Serve waits for a constructor as long as it takes, and sends no request before.
        self._server = ReplicaServer(ReplicaSettings.model_validate(settings))
        await self._server.until_ready()
        self._watch = asyncio.create_task(self._end_with_server())

    async def __call__(self, request: Request) -> Response:
        """Answer a request as the server does."""
        return _Relayed(self._server)

    async def check_health(self) -> None:
        """Check the server. Ray Serve replaces a replica whose check fails three times, or whose process has ended.

        Raises:
            EngineError: the engine does not answer.
        """
        await self._server.check()

    async def __del__(self) -> None:
        """Stop the server. Ray Serve calls this when all requests of the replica have ended."""
        self._stopping = True
        await self._server.stop()

    async def _end_with_server(self) -> None:
        await self._server.ended.wait()
        if self._stopping:
            return
        # A replica without a server answers at once, and would look like the idlest of all.
        logger.error("the server of this replica has ended; the replica ends too")
        await asyncio.sleep(_LAST_ANSWERS_S)
        os._exit(1)


# These are the defaults of `serve run IMPORT_PATH`; deploy/serve_config.yaml explains and overrides them.
PatServe: Any = serve.deployment(
    name="PatServe",
    max_ongoing_requests=64,
    max_queued_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=20,
    graceful_shutdown_timeout_s=120,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32},
)(Replica)


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application, from `args:` of a configuration or from KEY=VALUE after `serve run`.

    Raises:
        UsageError: an argument is wrong.
        MissingModel: no such folder, or no such model on the hub.
        UnsupportedModel: the model brings pickles or code.
    """
    return PatServe.bind(read_settings(arguments).model_dump())
