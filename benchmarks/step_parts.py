"""Time the parts of a decode step that are no layers, in the engine of pat-bench: each part's milliseconds.

Example: python -m benchmarks.step_parts --steps 800

One layer of a narrow model, so that next to nothing is multiplied; the output head has Llama-2's vocabulary. Parts are
timed from outside, by a clock around vLLM's own methods; the 5th percentile is what a part takes while nothing disturbs
it, the median what it took here. Parts lie within each other as the indentation says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pat_serve.machine.hardware import describe, serving_dtype
from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.engine.workers.process import worker_environment

_CONTEXT, _WARMUP_STEPS = 128, 20
_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    """Start an engine in a process with pat-bench's environment, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.child.write_text(json.dumps(parts_here(options)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        found, log = Path(scratch) / "parts.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "benchmarks.step_parts", "--child", str(found),
                   "--steps", str(options.steps), "--layers", str(options.layers)]  # fmt: skip
        environment = worker_environment(os.environ, scratch=Path(scratch), offline=True)
        with log.open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"the engine failed; its last words:\n{log.read_text(errors='replace')[-2000:]}")
        parts: dict[str, list[float]] = json.loads(found.read_text(encoding="utf-8"))
    machine = describe()
    print(f"{machine['cpu_model']}, {machine['cpu_cores']} cores, {serving_dtype()}, {options.layers} layer(s)\n")
    print("| part | ms, 5th percentile | median |\n|---|---|---|")
    for name, seconds in parts.items():
        print(f"| {name} | {1e3 * percentile(seconds, 5):.3f} | {1e3 * percentile(seconds, 50):.3f} |")


def parts_here(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each part of each step, in this process."""
    from pat_serve.server.engine.workers.stepped import SteppedEngine

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**_SHAPE, "num_hidden_layers": options.layers}))
        tokens = _CONTEXT + _WARMUP_STEPS + options.steps + 1
        engine = SteppedEngine(
            model=folder, dtype=serving_dtype(), load_format="dummy", batch_size=1, max_model_tokens=tokens,
            max_step_tokens=tokens, kv_cache_bytes=2**26, enforce_eager=True, seed=0,
        )  # fmt: skip
    inner: Any = engine._llm.llm_engine
    core = inner.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    seconds: dict[str, list[float]] = {}
    for label, owner, name in (
        ("step", inner, "step"),
        ("- schedule", core.scheduler, "schedule"),
        ("- execute_model", runner, "execute_model"),
        ("-- update states", runner, "_update_states"),
        ("-- prepare inputs", runner, "_prepare_inputs"),
        ("-- attention metadata", runner, "_build_attention_metadata"),
        ("-- forward: embedding, layers, norm", runner, "_model_forward"),
        ("-- logits: output head", runner.model, "compute_logits"),
        ("- sample", runner, "sample_tokens"),
        ("- update from output", core.scheduler, "update_from_output"),
        ("- process outputs", inner.output_processor, "process_outputs"),
    ):
        seconds[label] = []
        setattr(owner, name, timed(getattr(owner, name), seconds[label]))
    draw = random.Random(0)
    prompt = [draw.randrange(_SHAPE["vocab_size"]) for _ in range(_CONTEXT)]
    engine.prefill([prompt], output_tokens=_WARMUP_STEPS + options.steps + 1)
    engine.decode(_WARMUP_STEPS)
    for samples in seconds.values():
        samples.clear()
    engine.decode(options.steps - 1)
    return seconds


def timed(method: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
    """The same, with its seconds put into `samples`."""

    def call(*arguments: Any, **options: Any) -> Any:
        begun_s = time.perf_counter()
        value = method(*arguments, **options)
        samples.append(time.perf_counter() - begun_s)
        return value

    return call


if __name__ == "__main__":
    main()
