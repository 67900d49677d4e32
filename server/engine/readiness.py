"""An engine is ready when it produced a token not long ago, for real traffic or else for a probe."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from pat_serve.server.engine.errors import EngineFault, NotReady
from pat_serve.server.engine.generation import Sampling
from pat_serve.server.engine.online import Engine

# A token not older than this proves that the engine answers.
FRESH_S = 5.0
# A busy CPU engine prefills a long prompt for seconds before it can take the probe.
PROBE_TIMEOUT_S = 10.0


class Readiness:
    """Knows when the engine last produced a token, and asks it for one when that is too long ago."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._probe: asyncio.Task[None] | None = None

    async def check(self, *, beside: Readiness | None = None) -> float:
        """Wait until the engine has proved itself, for `PROBE_TIMEOUT_S` at most.

        Args:
            beside: the readiness of an engine that takes turns with this one. The other engine's tokens count as well:
                this engine rests meanwhile, and a probe would disturb the other's turn.

        Returns:
            the age of the last token in seconds.

        Raises:
            NotReady: the engine is dead or does not answer.
        """
        if self._engine.dead:
            raise NotReady("the engine has stopped")
        ages_s = [self._age_s(), beside._age_s() if beside is not None else None]
        age_s = min((age_s for age_s in ages_s if age_s is not None), default=None)
        if age_s is None or age_s > FRESH_S:
            # There is one probe at a time, shared by all who ask. The probe outlives the client that asked first.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._generate_one_token())
            await asyncio.shield(self._probe)
            age_s = self._age_s()
        # An aborted probe (the server is stopping) ends without an error and without a token.
        if age_s is None or age_s > FRESH_S:
            raise NotReady("the engine ended a probe without a token")
        return age_s

    def _age_s(self) -> float | None:
        at_s = self._engine.last_token_s
        return None if at_s is None else time.monotonic() - at_s

    async def _generate_one_token(self) -> None:
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), aclosing(self._engine.generate([0], sampling)) as pieces:
                async for _ in pieces:
                    pass
        except TimeoutError:
            raise NotReady(f"the engine has produced no token for {PROBE_TIMEOUT_S:g} s") from None
        except EngineFault as error:
            raise NotReady(error.message) from error
