"""The cost of PAT in training: time of an optimizer step and peak memory against LoRA, at Llama-2-7B's layer shapes.

Example: python benchmarks/training_cost.py --layers 2 --vocab 4096 --batch 1 --length 128 --rounds 6

All methods take turns (A B C C B A ...), so that what slows the machine slows all of them. They share one frozen base
of random weights, but for the default, which is cut down before its first step. Memory is the peak of a process of its
own for each, the wide base that it begins with included. The bar: 1.15 of LoRA's time and 1.10 of its memory.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pat_serve.families.architectures import FAMILIES
from pat_serve.server.analysis.statistics import PairedRatio, paired_ratio, percentile
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import METHODS as PRUNERS
from pat_serve.training.model.insert import adapt
from pat_serve.training.model.slicing import slice_model
from pat_serve.training.presets import PAPER

# The paper matches PAT (LoRA 20 and HIO 200) with LoRA 64 in parameters; LoRA 20 is the same adapter without PAT.
METHODS: dict[str, dict[str, Any]] = {
    "pat": {"method": "pat", "lora_rank": 20},
    "pat-wide": {"method": "pat", "lora_rank": 20, "narrow": "off"},
    "pat-paper": {**PAPER, "method": "pat", "lora_rank": 20, "hio_rank": 200},
    "lora-20": {"method": "lora", "lora_rank": 20},
    "lora-64": {"method": "lora", "lora_rank": 64},
}
PRUNING, DENSE = ("pat", "pat-wide", "pat-paper"), ("lora-20", "lora-64")
# A calibration decides which channels and which axes, and neither costs a step anything.
UNCALIBRATED = {"rotate": "none", "mask_start": "zero"}
TIME_BAR, MEMORY_BAR = 1.15, 1.10
TOTAL_STEPS = 10_000


def make_base(options: argparse.Namespace) -> Any:
    """A random Llama of 7B's layer shapes, cut in depth and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_hidden_layers=options.layers,
        vocab_size=options.vocab,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def recipe_of(settings: dict[str, Any]) -> TrainRecipe:
    """A method's settings, resolved, without what is only measured."""
    recipe = TrainRecipe(model="random", data="random", **settings)
    return recipe.resolved(tied=False, prunes=PRUNERS[recipe.method].prunes).model_copy(update=UNCALIBRATED)


def make_step(base: Any, settings: dict[str, Any], options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that takes one optimizer step of a method, as pat-train takes it, and how many numbers it trains."""
    recipe = recipe_of(settings)
    width = options.hidden * 3 // 4 if PRUNERS[recipe.method].prunes else options.hidden
    # In float32 whatever the base: the default dtype would make LoRA's factors.
    model, method = adapt(base, FAMILIES["llama"], recipe, {"hidden": width}, TOTAL_STEPS)
    if method.stays_wide(recipe) is None:
        method.on_step(0)
        slice_model(model, method, method.cuts())
    model.to(options.device).train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    ids = torch.randint(options.vocab, (options.batch, options.length), device=options.device)

    def step() -> None:
        method.on_step(1)
        for micro in range(options.accumulation):
            with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                loss = model(input_ids=ids, labels=ids).loss / options.accumulation
                if micro == options.accumulation - 1:
                    loss = sum(method.losses().values(), loss)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step, sum(parameter.numel() for parameter in trained)


def measure_times(
    options: argparse.Namespace, base: Any, methods: dict[str, dict[str, Any]]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step by method, in turns, of which the i-th of each belong together; and what each trains."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    steps, trained = {}, {}
    for name, settings in methods.items():
        # Cut down in place, a shared one would be narrow for all.
        recipe = recipe_of(settings)
        narrows = PRUNERS[recipe.method].stays_wide(recipe) is None
        own = copy.deepcopy(base, {} if narrows else dict(shared))
        steps[name], trained[name] = make_step(own, settings, options)
    for step in steps.values():  # the first one makes the optimizer's state
        step()
    # One thread's own seconds are what is left to compare by on a machine that others load.
    clock = time.process_time if options.clock == "process" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(options.rounds):
        for name in list(methods) if number % 2 == 0 else reversed(methods):
            began = clock()
            steps[name]()
            times[name].append(clock() - began)
    return times, trained


def measure_memory(name: str, options: argparse.Namespace) -> int:
    """Peak bytes of this process over two steps of one method: allocated on the GPU, or resident."""
    step, _ = make_step(make_base(options), METHODS[name], options)
    for _ in range(2):
        step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Every PAT with every LoRA that is measured beside it."""
    return [(one, other) for one, other in itertools.product(PRUNING, DENSE) if {one, other} <= set(names)]


def summary(times: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Medians, ratios of every PAT to each LoRA with their intervals, and whether they meet the bar."""
    against: dict[str, dict[str, Any]] = {name: {} for name in times if name in PRUNING}
    for pruning, name in pairs(times):
        ratio: PairedRatio = paired_ratio(times[pruning], times[name])
        memory = peaks[pruning] / peaks[name]
        against[pruning][name] = {
            "time_ratio": ratio.median,
            "time_ratio_low": ratio.low,
            "time_ratio_high": ratio.high,
            "memory_ratio": memory,
            "met": ratio.median <= TIME_BAR and memory <= MEMORY_BAR,
        }
    return {
        "step_s": {name: percentile(samples, 50) for name, samples in times.items()},
        "peak_bytes": peaks,
        "against": against,
        "samples_s": times,
    }


def parse() -> argparse.Namespace:
    """Read the command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "layers": 2, "hidden": 4096, "ffn": 11008, "heads": 32, "vocab": 32000,
        "batch": 1, "length": 128, "accumulation": 1, "rounds": 6,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"[default: {value}]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: this process's CPU time")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="[default: all]")
    parser.add_argument("--memory-of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and report; exit 1 when the default misses the bar against either LoRA."""
    options = parse()
    if options.memory_of:
        print(measure_memory(options.memory_of, options))
        return
    peaks = {}
    for name in options.methods:
        command = [sys.executable, *sys.argv, "--memory-of", name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    times, _ = measure_times(options, make_base(options), {name: METHODS[name] for name in options.methods})
    result = {"settings": vars(options), **summary(times, peaks)}
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name, seconds in result["step_s"].items():
            print(f"{name:10} step {seconds:8.3f} s   peak {peaks[name] / 2**30:6.2f} GiB")
        for pruning, name in pairs(peaks):
            it = result["against"][pruning][name]
            interval = f"{it['time_ratio']:.3f} [{it['time_ratio_low']:.3f}, {it['time_ratio_high']:.3f}]"
            met = "met" if it["met"] else "not met"
            print(f"{pruning:10} / {name}: time {interval}, memory {it['memory_ratio']:.3f}: {met}")
    sys.exit(0 if all(it["met"] for it in result["against"].get("pat", {}).values()) else 1)


if __name__ == "__main__":
    main()
