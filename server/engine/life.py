"""The served engine from its binding to the routes until its end."""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pat_serve.server.engine.failures import expect_its_end
from pat_serve.server.engine.online import Engine, chat_settings
from pat_serve.server.engine.patches import replace_shutdown


@dataclass(kw_only=True)
class EngineLife:
    """The end of the served engine.

    Attributes:
        died: whether the engine was dead when it was shut down; None before its shutdown.
    """

    died: bool | None = None


def attach(client: Any, args: Namespace, life: EngineLife) -> Engine:
    """Take over the engine that vLLM has started for its server.

    When a signal stops the server, vLLM shuts its engine down in a thread, with the HTTP server still answering: the
    engine's `before_stop` is called there first, and may wait for the requests under way.

    vLLM's server ends in the same way, and without an error, when its engine dies and when a signal stops it. A
    supervisor must see the difference, so the engine's first shutdown notes whether the engine was dead already.

    vLLM also stops reading the engine's output at once, often before the engine has said that the requests under way
    are aborted. The streams of these requests would then wait for ever, and the HTTP server for the streams. So the
    requests are ended here: before the shutdown of an engine that is not to drain, and after any shutdown those that
    are left.

    Args:
        client: vLLM's AsyncLLM.
        args: of vLLM's server.
        life: takes the note.
    """
    names = args.served_model_name or [args.model]
    engine = Engine(client, names[0], chat_settings(args))
    loop = asyncio.get_running_loop()

    def note_and_shut_down(shut_down: Callable[..., None], timeout: float | None) -> None:
        if life.died is None:
            life.died = engine.dead
            # On the main thread the loop, which the requests under way need, would stand still.
            if not life.died and threading.current_thread() is not threading.main_thread():
                engine.before_stop()
        if not life.died:
            expect_its_end()
            if not timeout:
                end_requests()
        shut_down(timeout=timeout)
        end_requests()

    def end_requests() -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(engine.abort_all)

    replace_shutdown(client, note_and_shut_down)
    return engine
