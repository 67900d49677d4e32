"""What the server's own engine tells while it runs, and how it is brought to its end: vLLM's client, taught both."""

from __future__ import annotations

import asyncio
import threading
import time
from argparse import Namespace
from contextlib import suppress
from typing import Any

from pat_serve.server.engine.failures import expect_its_end
from pat_serve.server.engine.online import Engine, chat_settings


def attach(client: Any, args: Namespace) -> Engine:
    """The engine behind a plugin's routes.

    When a signal stops the server, vLLM shuts its engine down in a thread, with the HTTP server still answering: the
    engine's `before_stop` is called there first, and may wait for the requests under way.

    vLLM's server ends in the same way, and without an error, when its engine dies and when a signal stops it. A
    supervisor must see the difference, so the engine's first shutdown notes on `args`, which vLLM hands through
    from `serve`, whether the engine was dead already.

    vLLM also stops reading the engine's output at once, often before the engine has said that the requests under way
    are aborted; their streams would then wait for ever, and the HTTP server for them. So they are ended here: before
    an engine that is not to drain, and after any for what is left.
    """
    names = args.served_model_name or [args.model]
    engine = Engine(client, names[0], chat_settings(args))
    shut_down = client.shutdown
    loop = asyncio.get_running_loop()

    def note_and_shut_down(timeout: float | None = None) -> None:
        if not hasattr(args, "engine_died"):
            args.engine_died = bool(client.errored)
            # On the main thread the loop, which the requests under way need, would stand still.
            if not args.engine_died and threading.current_thread() is not threading.main_thread():
                engine.before_stop()
        if not args.engine_died:
            expect_its_end()
            if not timeout:
                end_requests()
        shut_down(timeout=timeout)
        end_requests()

    def end_requests() -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(engine.abort_all)

    client.shutdown = note_and_shut_down
    process_outputs = client.output_processor.process_outputs

    def note_and_process(outputs: Any, *more: Any, **options: Any) -> Any:
        if any(output.new_token_ids for output in outputs):
            engine.last_token_s = time.monotonic()
        return process_outputs(outputs, *more, **options)

    client.output_processor.process_outputs = note_and_process
    return engine
