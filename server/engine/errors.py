"""The faults that an engine reports in place of tokens.

    EngineFault
    ├── RequestRefused     the engine can never serve this request; `param` names the field at fault
    ├── EngineOverloaded   its queue is full, and will have room again
    ├── EngineDead         it has stopped, and the server ends with it
    ├── BaselineDead       the baseline's engine has stopped, and the server goes on without it
    ├── BaselineMissing    the server was started without a baseline
    ├── GenerationFailed   a defect of the engine on one request
    └── NotReady           it produces no tokens

Nothing here knows HTTP. `server/http/errors.py` has the table that gives each fault its status and headers.
"""

from __future__ import annotations

from typing import ClassVar


class EngineFault(Exception):
    """The engine gives no tokens, or no more tokens.

    Args:
        message: one sentence for the person who asked.
        param: the field of the request that is at fault, if one is.
    """

    kind: ClassVar[str]
    """Stable machine-readable word for the kind of fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message = message
        self.param = param
        super().__init__(message)


class RequestRefused(EngineFault):
    """The request can never succeed as it stands."""

    kind = "invalid_request"


class EngineOverloaded(EngineFault):
    """The engine's own queue has no room for the request now."""

    kind = "overloaded"


class EngineDead(EngineFault):
    """The served engine died. The server ends too, and whoever keeps it starts it again."""

    kind = "engine_dead"

    def __init__(self) -> None:
        super().__init__("the engine has stopped; the server is shutting down")


class BaselineDead(EngineFault):
    """The baseline's engine died, and does not come back by itself."""

    kind = "baseline_dead"

    def __init__(self) -> None:
        super().__init__("the baseline's engine has stopped; restart the server to have it again")


class BaselineMissing(EngineFault):
    """The request needs a baseline, and the server was started without one."""

    kind = "no_baseline"

    def __init__(self) -> None:
        super().__init__(
            "this needs the dense parent beside the served model; start the server with --baseline DENSE_MODEL"
        )


class GenerationFailed(EngineFault):
    """The engine failed on one request by a defect of its own."""

    kind = "generation_failed"

    def __init__(self) -> None:
        super().__init__("the engine failed on this request; its log has the reason")


class NotReady(EngineFault):
    """The engine has not proved that it answers."""

    kind = "not_ready"
