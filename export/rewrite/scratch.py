"""Memory that tensors are rewritten in."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Memory that one thread reads and writes its tensors in, kept from tensor to tensor.

    A fresh allocation of a hundred megabytes costs more in page faults than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, use: str, size_bytes: int) -> Tensor:
        """Give so many bytes for one use; their former content is lost."""
        memory = self._memory.get(use)
        if memory is None or len(memory) < size_bytes:
            self._memory.pop(use, None)
            memory = self._memory[use] = torch.empty(size_bytes, dtype=torch.uint8)
        return memory[:size_bytes]

    def tensor(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the memory of one use."""
        return self.take(use, prod(shape) * dtype.itemsize).view(dtype).view(shape)
