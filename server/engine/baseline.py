"""`--baseline`: the dense parent runs as a second engine beside the served one, to answer and to be compared with."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace

from pat_serve.checkpoints.locate import locate, read_config
from pat_serve.errors import EngineError, UsageError
from pat_serve.machine.hardware import DTYPE_ALIASES, DTYPE_BYTES, available_memory_bytes
from pat_serve.server.engine.errors import BaselineDead, BaselineMissing
from pat_serve.server.engine.memory import PROCESS_BYTES, WEIGHT_COPIES
from pat_serve.server.engine.online import Engine
from pat_serve.server.engine.readiness import Readiness
from pat_serve.server.engine.serve import second_engine
from pat_serve.server.engine.workers.process_group import ProcessGroup, children
from pat_serve.shapes.sizes import ModelSizes

logger = logging.getLogger(__name__)

# An engine is a process for its scheduler and one for its model.
_PROCESSES = 2
_WATCH_S = 0.5


class Baseline:
    """The running baseline.

    The death of the baseline does not end the server: requests that need it are refused from then on.

    Args:
        engine: its engine.
        processes: the processes of its engine.
        start_s: seconds that its start took.
    """

    def __init__(self, engine: Engine, processes: ProcessGroup, start_s: float) -> None:
        self.engine = engine
        self.readiness = Readiness(engine)
        self.processes = processes
        self.start_s = start_s
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._watcher = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """End the baseline, from another thread than the loop's."""
        self._stopping = True
        self.engine.stop(self._loop)

    async def _watch(self) -> None:
        while not self._stopping:
            if self.engine.dead:
                logger.error("the baseline's engine has died; the server goes on without it")
                # The engine's worker may be left, with the model in memory.
                await asyncio.to_thread(self.processes.end)
                return
            await asyncio.sleep(_WATCH_S)


def start_baseline(args: Namespace, model: str) -> Baseline:
    """Start the baseline's engine with the flags of the served one.

    The start blocks the event loop, before anything listens.

    Raises:
        EngineError: the engine does not start.
    """
    before = {process.pid for process in children()}
    engine = second_engine(args, model)
    engine.death = BaselineDead
    processes = ProcessGroup(process for process in children() if process.pid not in before)
    return Baseline(engine, processes, start_s=processes.age_s())


def available(baseline: Baseline | None) -> Baseline:
    """Give the baseline back, if it can answer.

    Raises:
        BaselineMissing: there is none.
        BaselineDead: its engine died.
    """
    if baseline is None:
        raise BaselineMissing
    if baseline.engine.dead:
        raise baseline.engine.death()
    return baseline


def check_comparable(model: str, baseline: str) -> None:
    """Refuse a baseline that cannot be given the same token ids.

    Raises:
        UsageError: different vocabularies.
        ModelError: a model is not there or not readable.
    """
    vocabularies = [_shape(name).vocab for name in (model, baseline)]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"--baseline {baseline}",
            expected=f"a vocabulary of {vocabularies[0]}, as {model} has it",
            found=f"one of {vocabularies[1]}",
            fix="Give the model that the served one was pruned from.",
        )


def check_memory(model: str, baseline: str, *, dtype: str, kv_cache_bytes: int) -> None:
    """Refuse to start two engines that this machine's memory does not hold.

    Args:
        model: the served model.
        baseline: its dense parent.
        dtype: of both models.
        kv_cache_bytes: size of each engine's KV cache.

    Raises:
        EngineError: with both amounts.
    """
    parameter_bytes = DTYPE_BYTES.get(DTYPE_ALIASES.get(dtype, dtype), 4)
    weights = sum(_shape(name).parameters for name in (model, baseline)) * parameter_bytes
    needed = int(WEIGHT_COPIES * weights) + 2 * (kv_cache_bytes + _PROCESSES * PROCESS_BYTES)
    free = available_memory_bytes()
    if needed > free:
        raise EngineError(
            f"--baseline {baseline}",
            expected=f"about {needed / 2**30:.1f} GiB of memory for both engines in {dtype}",
            found=f"{free / 2**30:.1f} GiB available",
            fix="Lower --kv-cache-gib, free memory, or leave --baseline out.",
        )


def _shape(name: str) -> ModelSizes:
    return ModelSizes.of(read_config(locate(name, weights=False)), source=name)
