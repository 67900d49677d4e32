"""The handover between the launcher and the plugin, by way of vLLM's server, which hands its `args` to both."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

from pat_serve.server.engine.life import EngineLife
from pat_serve.server.http.access_log import LogFormat
from pat_serve.server.http.observer import Observation
from pat_serve.server.http.policy import Policy


@dataclass(kw_only=True)
class Handover:
    """The settings that the launcher gives, and the news that the plugin gives back.

    Attributes:
        policy: bounds of the HTTP side.
        log_format: form of a line in the access log.
        baseline: the dense parent that runs beside the model; None without.
        life: takes the note of how the served engine ended.
        observation: set by the plugin, and with it the front is in place; None until then.
    """

    policy: Policy
    log_format: LogFormat = LogFormat.TEXT
    baseline: str | None = None
    life: EngineLife = field(default_factory=EngineLife)
    observation: Observation | None = None

    @property
    def guarded(self) -> bool:
        """Whether every request passes the front."""
        return self.observation is not None

    def give(self, args: Namespace) -> None:
        """Put this on vLLM's arguments."""
        args.pat_serve = self

    @staticmethod
    def given(args: Namespace) -> Handover | None:
        """The handover on vLLM's arguments; None in a plain vLLM server, which has no launcher of ours."""
        found = getattr(args, "pat_serve", None)
        assert found is None or isinstance(found, Handover)
        return found
