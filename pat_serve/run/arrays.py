"""The arrays of a plan on disk, `plan.safetensors`: each is checked, the large ones are read late.

Every function raises `BrokenPlan` where the file does not hold what plan.json says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pat_serve.checkpoints.shards import DTYPES, TensorEntry
from pat_serve.cut.hybrid import HybridFold
from pat_serve.errors import BrokenPlan

ARRAY_DTYPES = DTYPES | {"I64": torch.int64}
_FLOATS = frozenset(DTYPES.values())


class StoredFolds(Mapping[str, HybridFold]):
    """The operators in a plan.safetensors, each read when it is asked for."""

    def __init__(self, path: Path, sites: list[str], entries: dict[str, TensorEntry]) -> None:
        self._path = path
        self._sites = dict.fromkeys(sites)
        self._entries = entries

    def __getitem__(self, site: str) -> HybridFold:
        if site not in self._sites:
            raise KeyError(site)
        l0, l1, scale = (self._entries[name].read() for name in self._names(site))
        return HybridFold(l0_RD=l0, l1_DR=l1, scale_D=scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def arrays(self) -> list[str]:
        """Names of all arrays that plan.safetensors has for the operators."""
        return [name for site in self._sites for name in self._names(site)]

    def check(self) -> None:
        """Every operator is there, of matching shapes and finite; one is in memory at a time."""
        for site in self._sites:
            names = self._names(site)
            scale = stored_array(self._path, names[2], self._entries, (None,))
            l0 = stored_array(self._path, names[0], self._entries, (None, scale.shape[0]))
            stored_array(self._path, names[1], self._entries, l0.shape[::-1])
            for name in names:
                check_finite(self._path, name, self._entries[name].read())

    @staticmethod
    def _names(site: str) -> list[str]:
        return [f"folds.{site}.{part}" for part in ("l0", "l1", "scale")]


def stored_array(path: Path, name: str, entries: dict[str, TensorEntry], shape: tuple[int | None, ...]) -> TensorEntry:
    """An array of floats of this shape; None stands for any length."""
    entry = entries.get(name)
    if entry is None:
        raise broken_plan(path, f"the array {name}", "no such array")
    fits = len(entry.shape) == len(shape) and all(
        want in (None, has) for want, has in zip(shape, entry.shape, strict=True)
    )
    if not fits or entry.dtype not in _FLOATS:
        raise broken_plan(path, f"{name} as floats", f"{entry.dtype}")
    return entry


def read_kept(path: Path, array: str, line: str, count: int, width: int, entries: dict[str, TensorEntry]) -> Tensor:
    """The kept indices (count,) of a line of the cuts.

    Args:
        path: plan.safetensors.
        array: name of the array that holds them.
        line: of the cuts, for the message.
        count: how many plan.json says there are.
        width: length of the axis.
        entries: of the file.
    """
    entry = entries.get(array)
    if entry is None or entry.dtype != torch.int64 or len(entry.shape) != 1:
        raise broken_plan(path, f"int64 indices for the axis {line}", "none" if entry is None else f"{entry.dtype}")
    kept = entry.read()
    in_order = len(kept) == count and bool((kept[1:] > kept[:-1]).all())
    if not in_order or int(kept[0]) < 0 or int(kept[-1]) >= width:
        raise broken_plan(path, f"ascending indices below {width} for the axis {line}", "other ones")
    return kept


def check_finite(path: Path, name: str, values: Tensor) -> None:
    """An array holds no NaN and no infinity."""
    if not bool(torch.isfinite(values).all()):
        raise broken_plan(path, f"finite numbers in {name}", "NaN or infinity")


def check_rotation(path: Path, rotation: Tensor) -> None:
    """A matrix that is not orthogonal changes the model, and the parity gate applies the same one."""
    check_finite(path, "rotation", rotation)
    width = len(rotation)
    if rotation.shape != (width, width):
        raise broken_plan(path, "a square rotation", f"shape {tuple(rotation.shape)}")
    probe = torch.randn(width, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rotation.dtype)
    back = rotation.T @ (rotation @ probe)
    if float((back - probe).abs().max()) > 1e-2:
        raise broken_plan(path, "an orthogonal rotation", "another matrix")


def broken_plan(path: Path, expected: str, found: str) -> BrokenPlan:
    """The error of a plan's file."""
    return BrokenPlan(path, expected=expected, found=found, fix="Copy the run again, or repeat the training.")
