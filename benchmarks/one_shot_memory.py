"""Measure the peak memory of `pat-train --method one-shot` on a base with Llama-2-7B's widths, by number of layers.

Example: `python -m benchmarks.one_shot_memory smollm2/ --data train.jsonl --layers 2,4`

The weights are random, in bfloat16; tokenizer and vocabulary are those of MODEL. Each run is a process of its own, and
its peak is the largest resident set. The run streams layer by layer if the peak does not grow with the layers. The
bar is 1.5 GB and four layers, as the file holds them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pat_serve.machine.hardware import describe

BAR_BYTES, BAR_LAYERS = 1_500_000_000, 4
_BFLOAT16_BYTES = 2


def save_base(folder: Path, model: str, layers: int) -> int:
    """Write a base of so many layers; return the bytes of a layer's weights."""
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return _BFLOAT16_BYTES * sum(weight.numel() for weight in base.model.layers[0].parameters())


def peak_of(arguments: list[str]) -> tuple[int, float]:
    """Run pat-train; its largest resident set in bytes, and its seconds."""
    began_s = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", "from pat_serve.cli.train import main; main()", *arguments],
        os.environ,
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"pat-train ended with status {os.waitstatus_to_exitcode(status)}")
    # Linux counts in KiB.
    return usage.ru_maxrss * 1024, time.monotonic() - began_s


def main() -> None:
    """Print a line of JSON for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the tokenizer")
    parser.add_argument("--data", required=True, help="calibration rows")
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row at most")
    parser.add_argument("--own", nargs="*", default=[], help="settings of the method, as sparsity=0.5")
    options = parser.parse_args()
    for layers in map(int, options.layers.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            layer_bytes = save_base(Path(scratch) / "base", options.model, layers)
            own = [part for one in options.own for part in ("--" + one.partition("=")[0], one.partition("=")[2])]
            peak, seconds = peak_of([
                *("--method", "one-shot", "--model", f"{scratch}/base", "--data", options.data, *own),
                *("--calibration-rows", str(options.rows), "--max-length-tokens", str(options.length)),
                *("--out", f"{scratch}/run"),
            ])  # fmt: skip
        print(
            json.dumps({
                "layers": layers,
                "peak_bytes": peak,
                "layer_bytes": layer_bytes,
                "bar_bytes": BAR_BYTES + BAR_LAYERS * layer_bytes,
                "seconds": round(seconds, 1),
                "rows": options.rows,
                "length_tokens": options.length,
                "own": options.own,
                "cpu": describe()["cpu_model"],
            }),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
