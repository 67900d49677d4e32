"""vLLM's queues fit into a container's /dev/shm."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pat_serve.server.engine import shared_memory
from pat_serve.server.engine.shared_memory import ROOMY_BYTES, SMALL_CHUNK_BYTES, fit_shared_memory

pytestmark = pytest.mark.vllm

DOCKERS_OWN_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    monkeypatch.setattr(ShmRingBuffer, "__init__", ShmRingBuffer.__init__)


def free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_bytes))


def test_queues_of_a_small_dev_shm_carry_small_and_large_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    free(monkeypatch, DOCKERS_OWN_BYTES)
    fit_shared_memory()
    writer = MessageQueue(1, 1)
    assert writer.buffer.total_bytes_of_buffer < 11 * SMALL_CHUNK_BYTES < DOCKERS_OWN_BYTES / 5
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    # The socket drops what is sent before its reader is there.
    with ThreadPoolExecutor() as threads:
        for ready in [threads.submit(end.wait_until_ready) for end in (writer, reader)]:
            ready.result()
    assert reader.buffer.max_chunk_bytes == SMALL_CHUNK_BYTES
    # A message that does not fit into a chunk takes vLLM's socket.
    for message in ("a step", b"x" * (3 * SMALL_CHUNK_BYTES), "the next"):
        writer.enqueue(message)
        assert reader.dequeue(timeout=300) == message


@pytest.mark.parametrize("room", ["enough", "no such folder"])
def test_vllms_own_sizes_stay(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    before = ShmRingBuffer.__init__
    free(monkeypatch, ROOMY_BYTES if room == "enough" else DOCKERS_OWN_BYTES)
    if room == "no such folder":
        monkeypatch.setattr(shared_memory, "SHARED_MEMORY", Path("/nowhere"))
    fit_shared_memory()
    assert ShmRingBuffer.__init__ is before
