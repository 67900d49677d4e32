"""Where does the memory of vLLM's engine go while it serves? vLLM alone, in one process, with the soak's requests.

Example: python -m benchmarks.engine_memory --model FOLDER --minutes 5

Between batches it reads the process's resident memory, and what glibc says of its heap (mallinfo2): bytes in use, and
bytes that are free and kept. Growth in use is kept by somebody. Growth of what is free is fragmentation, which
malloc_trim gives back at the end. Growth of neither is memory that something maps for itself, such as compiled kernels.
--tracemalloc adds the lines of Python that hold more at the end than after the first quarter, and slows the run.

oneDNN compiles a product of matrices anew for each number of tokens in a step, and keeps the last 1,024 of them. The
variable ONEDNN_PRIMITIVE_CACHE_CAPACITY changes that bound, so that the growth can be told to come from them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak_load import MODEL_LENGTH
from tests.tiny_models import save_tiny_llama

MIB = 2**20
_BATCH = 12
_NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of this process: resident; of glibc's heap in use; of it free and kept."""

    requests: int
    resident: int
    used: int
    free: int


def look(requests: int) -> Memory:
    """Read them."""
    told = _libc().mallinfo2()
    return Memory(
        requests=requests,
        resident=psutil.Process().memory_info().rss,
        used=told.uordblks + told.hblkhd,
        free=told.fordblks,
    )


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Heap
    return libc


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; a tiny random one by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kv-cache-mib", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--one-length", action="store_true", help="all prompts 32 tokens, all answers 8")
    parser.add_argument("--tracemalloc", action="store_true")
    options = parser.parse_args()
    # Everything in this process, where it can be looked at.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or save_tiny_llama(Path(scratch) / "model", max_position_embeddings=MODEL_LENGTH)
        engine = LLM(
            model=str(model),
            dtype=options.dtype,
            max_model_len=MODEL_LENGTH,
            max_num_seqs=8,
            enforce_eager=True,
            kv_cache_memory_bytes=options.kv_cache_mib * MIB,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )
        chance, seen, first = random.Random(0), [look(0)], None
        begun_s = time.monotonic()
        while (spent := time.monotonic() - begun_s) < options.minutes * 60:
            lengths = [
                (32, 8) if options.one_length else (chance.randrange(4, 60), chance.randrange(1, 24))
                for _ in range(_BATCH)
            ]
            engine.generate(
                [{"prompt_token_ids": [chance.randrange(3, 380) for _ in range(size)]} for size, _ in lengths],
                [SamplingParams(max_tokens=tokens, ignore_eos=True) for _, tokens in lengths],
                use_tqdm=False,
            )
            seen.append(look(seen[-1].requests + _BATCH))
            if options.tracemalloc and first is None and spent > options.minutes * 15:
                tracemalloc.start(8)
                first = tracemalloc.take_snapshot()
    show(seen)
    if first is not None:
        for line in tracemalloc.take_snapshot().compare_to(first, "lineno")[:12]:
            print(line)


def show(seen: list[Memory]) -> None:
    """Print about ten rows, the growth per request after the first quarter, and what a trim gives back."""
    print("| requests | resident, MiB | heap in use | heap free |\n|---|---|---|---|")
    for one in [*seen[:: max(1, len(seen) // 10)], seen[-1]]:
        print(f"| {one.requests} | {one.resident / MIB:.1f} | {one.used / MIB:.1f} | {one.free / MIB:.1f} |")
    begun, end = seen[len(seen) // 4], seen[-1]
    for name in ("resident", "used", "free"):
        grown = (getattr(end, name) - getattr(begun, name)) / (end.requests - begun.requests)
        print(f"{name}: {grown:.0f} bytes a request after the first quarter")
    _libc().malloc_trim(0)
    trimmed = look(end.requests)
    back = (end.resident - trimmed.resident) / MIB
    print(f"malloc_trim: {back:.1f} MiB given back, resident {trimmed.resident / MIB:.1f}")


if __name__ == "__main__":
    main()
