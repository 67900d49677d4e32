"""Llama-2-7B shapes at full depth on a GPU, a quarter narrower against dense: torch and transformers alone.

    python -m benchmarks.gpu_shapes --batch 1,8,32 --context 128,1024,2048 --out gpu.json
    python -m benchmarks.gpu_shapes --batch 1,8,32 --context 128,1024 --phases decode --compile
    python -m benchmarks.gpu_shapes --batch 1,4,16,64 --context 128 --phases prefill --graph-prefill   # as the paper's
    python -m benchmarks.gpu_shapes --batch 1 --context 128 --phases decode --profile

Random bfloat16 weights; decode steps as CUDA graphs over a static cache, prefill eager, or as a graph too, since eager
launches take longer than the kernels of a short prompt. `--compile` fuses what stands between the matrix products of a
decode step, as serving engines do; `--profile` says what kinds of kernels a step's time goes to. Both models are on the
GPU at once (13.5 and 10.1 GB beside their caches) and take turns, ABBA; ratios are paired, beside the ceiling that
counted bytes (decode) or FLOPs (prefill) give, and beside the floor: the time that the counted work takes at this
GPU's own measured rates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_runner import STEPS, WARMUPS, Runner, kernels, turn_s
from pat_serve.machine.hardware import describe
from pat_serve.server.analysis.statistics import paired_ratio, percentile
from pat_serve.server.engine.workers.probe import MachineRates, measure_rates
from pat_serve.shapes.roofline import (
    decode_ceiling,
    decode_flops,
    prefill_bytes,
    prefill_ceiling,
    prefill_flops,
)
from pat_serve.shapes.sizes import ModelSizes, decode_bytes

SHAPES = {"dense": "llama2-7b", "narrow": "llama2-7b-pat25"}
DTYPE, DTYPE_BYTES = torch.bfloat16, 2
LEAST_ROUNDS = 6


def config(name: str, layers: int | None) -> dict[str, Any]:
    """Read the config of a shipped shape."""
    text = (files("pat_serve.server.bench") / "shapes" / f"{SHAPES[name]}.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return {**loaded, **({"num_hidden_layers": layers} if layers else {})}


def build(settings: dict[str, Any], device: str) -> LlamaForCausalLM:
    """Make a random model on the GPU, without a copy through the host."""
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def fuse(model: LlamaForCausalLM) -> None:
    """Let the compiler fuse the norms and the MLP's activation with what stands beside them."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=False)
    model.model.norm.compile(dynamic=False)


def measure(runners: dict[str, Runner], phase: str, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Both models in turns, for so many rounds or, after LEAST_ROUNDS, until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(WARMUPS):
        for runner in runners.values():
            turn_s(runner, phase)
    deadline_s = time.monotonic() + seconds
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.monotonic() > deadline_s:
            break
        for name in list(runners) if index % 2 else list(runners)[::-1]:
            times[name].append(turn_s(runners[name], phase))
    return times


def ceiling_of(shapes: dict[str, ModelSizes], phase: str, batch: int, context: int) -> float:
    """Compute the largest ratio that counted bytes or FLOPs allow."""
    pair = (shapes["dense"], shapes["narrow"])
    if phase == "prefill":
        return prefill_ceiling(*pair, batch_size=batch, prompt_tokens=context)
    tokens = context + STEPS / 2
    return decode_ceiling(*pair, batch_size=batch, context_tokens=tokens, dtype_bytes=DTYPE_BYTES)


def floor_s(rates: MachineRates, shape: ModelSizes, phase: str, batch: int, context: int) -> float:
    """The time that the counted work takes at the machine's own rates."""
    if phase == "prefill":
        size: dict[str, Any] = {"batch_size": batch, "prompt_tokens": context}
        return rates.floor_s(
            read_bytes=prefill_bytes(shape, **size, dtype_bytes=DTYPE_BYTES), flops=prefill_flops(shape, **size)
        )
    size = {"batch_size": batch, "context_tokens": context + STEPS / 2}
    return rates.floor_s(
        read_bytes=decode_bytes(shape, **size, dtype_bytes=DTYPE_BYTES), flops=decode_flops(shape, **size)
    )


def cell(
    models: dict[str, LlamaForCausalLM],
    shapes: dict[str, ModelSizes],
    rates: MachineRates,
    batch: int,
    context: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All phases of one batch and context."""
    lines: list[dict[str, Any]] = []
    decodes = "decode" in options.phases
    runners = {
        name: Runner(model, batch, context, decodes=decodes, graph_prefill=options.graph_prefill)
        for name, model in models.items()
    }
    for phase in options.phases:
        times = measure(runners, phase, rounds=options.rounds, seconds=options.seconds)
        ratio, ceiling = paired_ratio(times["dense"], times["narrow"]), ceiling_of(shapes, phase, batch, context)
        medians = {name: percentile(samples, 50) for name, samples in times.items()}
        floors = {name: floor_s(rates, shape, phase, batch, context) for name, shape in shapes.items()}
        print(
            f"{phase:7s} {batch:3d} x {context:5d}: {medians['dense'] * 1e3:8.3f} ms {medians['narrow'] * 1e3:8.3f} ms "
            f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of {ceiling:.3f} = {ratio.median / ceiling:.0%}; "
            f"floors {floors['dense'] * 1e3:.3f}, {floors['narrow'] * 1e3:.3f} ms; {len(times['dense'])} rounds",
            flush=True,
        )
        lines.append(
            {"phase": phase, "batch": batch, "context_tokens": context, "ceiling": ceiling, "ratio": ratio.median,
             "ratio_low": ratio.low, "ratio_high": ratio.high, "median_s": medians, "floor_s": floors,
             "samples_s": times}
        )  # fmt: skip
    if options.profile:
        lines += [
            {
                "phase": f"{phase}, by kernel",
                "batch": batch,
                "context_tokens": context,
                "kernels_s": kernels(runners, phase),
            }
            for phase in options.phases
        ]
    return lines


def numbers(text: str) -> list[int]:
    """Read numbers from a text such as 1,8,32."""
    return [int(each) for each in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=numbers, default="1,8,32")
    parser.add_argument("--context", type=numbers, default="128,1024")
    parser.add_argument("--phases", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a phase, after which no round begins")
    parser.add_argument("--layers", type=int, default=None, help="cut both, for a smaller GPU")
    parser.add_argument("--graph-prefill", action="store_true", help="prefill as a CUDA graph: short prompts")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, by kind of kernel")
    parser.add_argument("--compile", action="store_true", help="fuse norms and activations of a decode step")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print a line for each phase, batch and context; write everything with --out."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: expected one, or --device cpu with --layers 1 to try the script")
    configs = {name: config(name, options.layers) for name in SHAPES}
    shapes = {name: ModelSizes.of(settings, source=name) for name, settings in configs.items()}
    rates = measure_rates("bfloat16")
    print(f"this machine: {rates.bytes_per_s / 1e12:.2f} TB/s read, {rates.flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    models = {name: build(settings, options.device) for name, settings in configs.items()}
    if options.compile:
        for model in models.values():
            fuse(model)
    lines, left_out = [], []
    with torch.inference_mode():
        for batch, context in itertools.product(options.batch, options.context):
            try:
                lines += cell(models, shapes, rates, batch, context, options)
            except torch.cuda.OutOfMemoryError:
                print(f"{batch} x {context}: does not fit both models' caches", flush=True)
                left_out.append([batch, context])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if options.out:
        record = {
            "machine": describe(), "layers": options.layers, "compile": options.compile, "rates": vars(rates),
            "weight_bytes": {name: shape.weight_bytes(DTYPE_BYTES) for name, shape in shapes.items()},
            "lines": lines, "left_out_for_memory": left_out,
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
