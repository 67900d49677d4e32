"""Write safetensors shards block by block, so that memory holds neither a shard nor a tensor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from pat_serve.checkpoints.shard_layout import encode_header, plan_shards, shard_names
from pat_serve.export.files.background_hash import Settling
from pat_serve.export.rewrite.scratch import Scratch

# Each with half of torch's threads. More would wait for the same disk and hold more tensors.
THREADS = 2


class WeightFiles:
    """The weight files of a checkpoint, each of its full size from the start, filled block by block in any order.

    Several threads may write at once. While its context lasts, the files are hashed and forced to the disk as they are
    written; at the end of the context they are on the disk, and `sha256` has their hashes.

    Args:
        folder: for the files.
        shapes: all tensors and their shapes, in order.
        dtype: of all tensors.
        max_shard_bytes: size of a file at most.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self._dtype = dtype
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        self.shards = plan_shards(shapes, dtype, max_shard_bytes)
        self.sha256: dict[str, str] = {}
        self._left_bytes: dict[str, int] = {}
        headers: list[int] = []
        sizes: list[tuple[int, int]] = []
        for number, (file, names) in enumerate(zip(shard_names(len(self.shards)), self.shards, strict=True)):
            header, offsets = encode_header({name: shapes[name] for name in names}, dtype)
            descriptor = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._descriptors.append(descriptor)
            _write_all(descriptor, memoryview(header), 0)
            for name, (begin, end) in offsets.items():
                self._places[name] = (number, len(header) + begin, end - begin)
                self._left_bytes[name] = end - begin
            headers.append(len(header))
            sizes.append((descriptor, len(header) + sum(end - begin for begin, end in offsets.values())))
        self._settling = Settling(sizes)
        for number, size in enumerate(headers):
            self._settling.note(number, 0, size)

    def write(self, name: str, done_bytes: int, block: Tensor) -> int:
        """Write a run of rows of a tensor.

        Args:
            name: of the tensor.
            done_bytes: what stands before the block in the tensor.
            block: contiguous rows in the files' dtype.

        Returns:
            bytes written.
        """
        assert block.dtype == self._dtype, name
        data = _bytes(block)
        number, offset, size = self._places[name]
        assert done_bytes + len(data) <= size, name
        begin = offset + done_bytes
        _write_all(self._descriptors[number], data, begin)
        self._left_bytes[name] -= len(data)
        self._settling.note(number, begin, begin + len(data))
        self._settling.check()
        return len(data)

    def __enter__(self) -> Self:
        self._settling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        assert kind is not None or not any(self._left_bytes.values()), "every byte of every tensor was written"
        try:
            self._settling.__exit__(kind, *rest)
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)
        if kind is None:
            self.sha256 = dict(zip(shard_names(len(self.shards)), self._settling.sha256, strict=True))


def write_blocks(
    files: WeightFiles,
    names: Iterable[str],
    blocks: Callable[[str, Scratch], Iterable[Tensor]],
    advance: Callable[[int], None],
) -> None:
    """Fill the files on two threads: while one waits for the disk or copies, the other computes.

    Args:
        files: to be filled.
        names: of all tensors.
        blocks: gives the rows of a tensor in order, with the calling thread's memory to put them in.
        advance: called with the bytes of each block that was written.

    Raises:
        Exception: the first that came up on either thread; then both have ended.
    """
    queue = iter(list(names))
    lock, stop = threading.Lock(), threading.Event()
    before = torch.get_num_threads()
    threads_each = max(1, before // THREADS)

    def work() -> None:
        torch.set_num_threads(threads_each)
        scratch = Scratch()
        while not stop.is_set():
            with lock:
                name = next(queue, None)
            if name is None:
                return
            done_bytes = 0
            for block in blocks(name, scratch):
                if stop.is_set():
                    return
                written = files.write(name, done_bytes, block)
                done_bytes += written
                advance(written)

    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="export") as pool:
            try:
                for worker in as_completed([pool.submit(work) for _ in range(THREADS)]):
                    worker.result()
            finally:
                stop.set()
    finally:
        torch.set_num_threads(before)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
