"""Lets vLLM's processes talk through a small /dev/shm: a container has 64 MiB unless it is told otherwise.

vLLM makes a queue from the engine to its workers and one back from each worker, of ten chunks of 16 and 24 MiB. One
worker so needs 400 MiB, and vLLM refuses to start where they are not free. A step sends a few kilobytes through the
queues, and a message larger than a chunk takes a socket instead, so small chunks cost nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# With less free memory than this, vLLM's own sizes could fail.
ROOMY_BYTES = 1 << 30
SMALL_CHUNK_BYTES = 1 << 20


def fit_shared_memory() -> None:
    """Make the queues small where shared memory is small.

    This is the entry point of `vllm.general_plugins`: vLLM calls it in each of its processes, before there are queues.
    """
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < ROOMY_BYTES:
        from pat_serve.server.engine.patches import bound_message_queues

        bound_message_queues(SMALL_CHUNK_BYTES)
