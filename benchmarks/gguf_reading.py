"""Measure what reading a GGUF base takes: seconds, and the most memory beside Python's and its libraries' own.

    python -m benchmarks.gguf_reading [--layers 16] [--hidden 2048]

A file of random Q8_0 blocks in the shape of Llama 3.2 1B is written first; it is read in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from pat_serve.demo.tiny.base_model import train_tokenizer
from pat_serve.machine.hardware import describe

HEAD_DIM, VOCABULARY, BLOCK = 64, 128256, 32
READ = """
import json, sys, time
import gguf, torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from pat_serve.checkpoints.locate import locate
def peak():
    # getrusage's would begin with the parent's.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before, start = peak(), time.monotonic()
folder = locate(sys.argv[1])
took = time.monotonic() - start
written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
print(json.dumps({"read_s": took, "peak_bytes": peak() - before, "written_bytes": written}))
"""


def main() -> None:
    """Write a GGUF file, read it in another process, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write(path, options.hidden, options.layers)
        environment = os.environ | {"PAT_SERVE_CACHE": scratch}
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        result = {"file_bytes": path.stat().st_size} | json.loads(done.stdout) | {"machine": describe()}
    sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")


def write(path: Path, hidden: int, layers: int) -> None:
    """A llama of random weights with a vocabulary of the size of Llama 3's."""
    heads, kv_heads, ffn = hidden // HEAD_DIM, max(1, hidden // HEAD_DIM // 4), 4 * hidden
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer)
    random = np.random.default_rng(0)
    _add_matrix(writer, "token_embd", VOCABULARY, hidden, random)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv_heads * HEAD_DIM, hidden),
        "attn_v": (kv_heads * HEAD_DIM, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            _add_matrix(writer, f"blk.{layer}.{name}", rows, columns, random)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_matrix(writer: gguf.GGUFWriter, name: str, rows: int, columns: int, random: np.random.Generator) -> None:
    blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK), np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    blocks[:, :, 2:] = random.integers(0, 256, (rows, columns // BLOCK, BLOCK), dtype=np.uint8)
    writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    document = json.loads(train_tokenizer([str(dict.__doc__)], 384).backend_tokenizer.to_str())
    tokens, kinds = [f"[PAD{index}]" for index in range(VOCABULARY)], [gguf.TokenType.UNUSED] * VOCABULARY
    for token, index in document["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])


if __name__ == "__main__":
    main()
