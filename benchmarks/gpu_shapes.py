"""Llama-2-7B shapes at full depth on a GPU, a quarter narrower against dense: torch and transformers alone.

Not run yet: no GPU was at hand when it was written.

    python -m benchmarks.gpu_shapes --batch 1,8,32 --context 128,1024 --out gpu.json

Random bfloat16 weights; decode steps as CUDA graphs over a static cache, prefill eager. Both models are on the GPU at
once (13.5 and 10.1 GB beside their caches) and take turns, ABBA; ratios are paired, beside the ceiling that counted
bytes (decode) or FLOPs (prefill) give.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from pat_serve.hardware import describe
from pat_serve.server.analysis.roofline import decode_ceiling, prefill_ceiling, shape_of
from pat_serve.server.analysis.statistics import paired_ratio

SHAPES = {"dense": "llama2-7b", "narrow": "llama2-7b-pat25"}
WARMUPS = 3


def config(name: str, layers: int | None) -> dict[str, Any]:
    """A shipped shape."""
    text = (files("pat_serve.server") / "shapes" / f"{SHAPES[name]}.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return {**loaded, **({"num_hidden_layers": layers} if layers else {})}


def build(settings: dict[str, Any]) -> LlamaForCausalLM:
    """A random model on the GPU, made there: no copy through the host."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    torch.set_default_dtype(torch.float32)
    return model


class Runner:
    """One model with a cache for one batch and context."""

    def __init__(self, model: LlamaForCausalLM, batch: int, context: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=context + 8)
        self._prompt = torch.randint(model.config.vocab_size, (batch, context), device="cuda")
        self._token = self._prompt[:, -1:].clone()
        self._position = torch.tensor([context], device="cuda")
        self.prefill()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def prefill(self) -> None:
        """The whole prompt, with the last position's logits alone."""
        self._cache.reset()
        positions = torch.arange(self._prompt.shape[1], device="cuda")
        self._model(self._prompt, past_key_values=self._cache, cache_position=positions, logits_to_keep=1)

    def decode(self) -> None:
        """One step of the captured graph; it writes the same cache slot every time."""
        self._graph.replay()

    def _step(self) -> None:
        self._model(self._token, past_key_values=self._cache, cache_position=self._position)


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Mean of some repeats, by CUDA's own clock."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(repeats):
        work()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / repeats


def main() -> None:
    """Print a line for each phase, batch and context; write everything with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", default="128,1024")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=None, help="cut both, for a smaller GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    configs = {name: config(name, arguments.layers) for name in SHAPES}
    shapes = {name: shape_of(settings, name) for name, settings in configs.items()}
    models = {name: build(settings) for name, settings in configs.items()}
    lines = []
    with torch.inference_mode():
        for batch, context in itertools.product(
            map(int, arguments.batch.split(",")), map(int, arguments.context.split(","))
        ):
            runners = {name: Runner(model, batch, context) for name, model in models.items()}
            pair = (shapes["dense"], shapes["narrow"])
            ceilings = {
                "prefill": prefill_ceiling(*pair, batch_size=batch, prompt_tokens=context),
                "decode": decode_ceiling(*pair, batch_size=batch, context_tokens=context, dtype_bytes=2),
            }
            for phase, ceiling in ceilings.items():
                times: dict[str, list[float]] = {name: [] for name in runners}
                for index in range(arguments.rounds + WARMUPS):
                    for name in list(runners) if index % 2 else list(runners)[::-1]:
                        taken_ms = milliseconds(getattr(runners[name], phase), 20 if phase == "decode" else 1)
                        if index >= WARMUPS:
                            times[name].append(taken_ms)
                ratio = paired_ratio(times["dense"], times["narrow"])
                print(
                    f"{phase:7s} {batch:3d} x {context:5d}: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of "
                    f"{ceiling:.3f}, {ratio.median / ceiling:.0%}"
                )
                lines.append(
                    {"phase": phase, "batch": batch, "context": context, "ceiling": ceiling, "ratio": ratio.median,
                     "low": ratio.low, "high": ratio.high, "milliseconds": times}
                )  # fmt: skip
            del runners
            torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"machine": describe(), "layers": arguments.layers, "lines": lines}, indent=2)
        )


if __name__ == "__main__":
    main()
