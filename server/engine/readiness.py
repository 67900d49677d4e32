"""Whether the engine answers: a token from real traffic, or else from a probe, not long ago."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from pat_serve.server.engine.generation import Sampling
from pat_serve.server.engine.online import Engine
from pat_serve.server.http.errors import HttpError

# A token not older than this proves that the engine answers.
FRESH_S = 5.0
# A busy CPU engine prefills a long prompt for seconds before it can take the probe.
PROBE_TIMEOUT_S = 10.0


class Readiness:
    """Knows when the engine last produced a token, and asks it for one when that is too long ago."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last_token_s: float | None = None
        self._probe: asyncio.Task[None] | None = None

    def note_token(self) -> None:
        """Record that the engine has produced a token just now."""
        self._last_token_s = time.monotonic()

    async def check(self, *, beside: Readiness | None = None) -> float:
        """Wait until the engine has proved itself, for `PROBE_TIMEOUT_S` at most.

        Args:
            beside: of an engine that takes turns with this one. A token of it is as good: this one rests meanwhile, and
                a probe would disturb what the other's turn measures.

        Returns:
            the age of the last token in seconds.

        Raises:
            HttpError: 503, the engine is dead or does not answer.
        """
        if self._engine.dead:
            raise HttpError(503, "not_ready", "the engine has stopped")
        ages_s = [self._age_s(), beside._age_s() if beside is not None else None]
        age_s = min((age_s for age_s in ages_s if age_s is not None), default=None)
        if age_s is None or age_s > FRESH_S:
            # One probe at a time, shared by all who ask; it outlives the one who asked first.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._generate_one_token())
            await asyncio.shield(self._probe)
            age_s = self._age_s()
        # An aborted probe (the server is stopping) ends without an error and without a token.
        if age_s is None or age_s > FRESH_S:
            raise HttpError(503, "not_ready", "the engine ended a probe without a token")
        return age_s

    def _age_s(self) -> float | None:
        seen = [at_s for at_s in (self._last_token_s, self._engine.last_token_s) if at_s is not None]
        return time.monotonic() - max(seen) if seen else None

    async def _generate_one_token(self) -> None:
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), aclosing(self._engine.generate([0], sampling)) as pieces:
                async for piece in pieces:
                    if piece.token_ids:
                        self.note_token()
        except TimeoutError:
            raise HttpError(503, "not_ready", f"the engine has produced no token for {PROBE_TIMEOUT_S:g} s") from None
        except HttpError as error:
            raise HttpError(503, "not_ready", error.message) from error
