"""One model with a cache on a GPU: prefills and decode steps, eager or as CUDA graphs, timed by the GPU's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM, StaticCache

WARMUPS = 3
# A turn has so many decode steps; the cache has room for them behind the context.
STEPS = 20


class Runner:
    """One model with a cache for one batch and context.

    The cache counts its tokens itself (transformers 5), also when a captured step is replayed: `rewind` sets it back.
    """

    def __init__(
        self, model: LlamaForCausalLM, batch: int, context: int, *, decodes: bool, graph_prefill: bool = False
    ) -> None:
        self._model, self._context = model, context
        self._cache = StaticCache(config=model.config, max_cache_len=context + STEPS)
        self._prompt = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
        self._token = self._prompt[:, -1:].clone()
        self._graph: Any = None
        self._prefill_graph: Any = None
        self.prefill()
        if decodes and model.device.type == "cuda":
            self._graph = self._captured(self._step)
        if graph_prefill:
            self._prefill_graph = self._captured(self._prefill_alone)

    def prefill(self) -> None:
        """Compute the whole prompt, with the last position's logits alone."""
        if self._prefill_graph is not None:
            self._prefill_graph.replay()
            return
        self._cache.reset()
        with torch.compiler.set_stance("force_eager"):
            self._model(self._prompt, past_key_values=self._cache, logits_to_keep=1)

    def rewind(self) -> None:
        """Set the cache back to the end of the prompt."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._context)

    def decode(self) -> None:
        """Compute one step: the next token of every request."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        self._model(self._token, past_key_values=self._cache)

    def _prefill_alone(self) -> None:
        # The graph has a cache of its own: a static one asks the GPU if it is empty, which no capture may wait for.
        self._model(self._prompt, use_cache=True, logits_to_keep=1)

    def _captured(self, work: Callable[[], None]) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self.rewind()
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


def turn_s(runner: Runner, phase: str) -> float:
    """Seconds of a prefill or of a decode step (mean of STEPS), by the GPU's own clock."""
    repeats = STEPS if phase == "decode" else 1
    runner.rewind()
    work: Callable[[], None] = getattr(runner, phase)
    if not torch.cuda.is_available():
        begun_s = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - begun_s) / repeats
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(repeats):
        work()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3 / repeats


KINDS = {
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "splitK", "cublas"),
    "attention, cache": ("flash", "fmha", "attention", "index_copy", "index_put", "softmax"),
}


def kernels(runners: dict[str, Runner], phase: str) -> dict[str, dict[str, float]]:
    """Measure and print the seconds of a step by kind of kernel."""
    found: dict[str, dict[str, float]] = {}
    for name, runner in runners.items():
        turn_s(runner, phase)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            turn_s(runner, phase)
        times: dict[str, float] = dict.fromkeys((*KINDS, "norms, rotary, other"), 0.0)
        for event in profile.key_averages():
            kinds = [kind for kind, parts in KINDS.items() if any(part.lower() in event.key.lower() for part in parts)]
            taken_s = event.self_device_time_total / 1e6 / (STEPS if phase == "decode" else 1)
            times[kinds[0] if kinds else "norms, rotary, other"] += taken_s
        found[name] = times
        print(
            f"  {name}: " + ", ".join(f"{kind} {seconds * 1e3:.3f} ms" for kind, seconds in times.items()), flush=True
        )
    return found
