"""Replaced weights of a run: tensors in `run/weights/` in place of the base's, in its shapes.

A plan names their files by SHA-256 (`PruningPlan.weights`). Where the residual stream is turned they belong to the
turned model, as trained gains, adapter and operators do, and are turned no more: a refitted reader may read a channel
whose gain is zero in the base, and no tensor in the base's own coordinates could say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.checkpoints.shards import TensorEntry, read_header
from pat_serve.errors import BrokenCheckpoint, BrokenPlan
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.files.atomic import rename_durably
from pat_serve.run.folder import WEIGHTS_FOLDER
from pat_serve.run.plan import file_sha256

# How the names of files begin: of weights before the first step, which a resumed run begins with, and of trained ones.
STARTED, TRAINED = "weights", "trained"
_FILE_BYTES = 2_000_000_000
_FIX = "Copy the run again, or repeat the training."


def started_files(run: Path) -> list[Path]:
    """The files of the weights that a run began with, in order."""
    return sorted((run / WEIGHTS_FOLDER).glob(f"{STARTED}-*.safetensors"))


def write_replaced(
    run: Path, tensors: Iterable[tuple[str, Tensor]], begins: str = STARTED, file_bytes: int = _FILE_BYTES
) -> dict[str, str]:
    """Write a run's replaced tensors; each file is complete or absent.

    Args:
        run: the run's folder.
        tensors: by their names in the base, in its shapes, of any float dtype. One file's worth is held at a time.
        begins: how the files' names begin.
        file_bytes: size of a file at about most.

    Returns:
        SHA-256 by file name, for the plan.
    """
    folder = run / WEIGHTS_FOLDER
    folder.mkdir(exist_ok=True)
    hashes: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        name = f"{begins}-{len(hashes) + 1:05d}.safetensors"
        write_replaced_file(folder, name, held)
        hashes[name] = file_sha256(folder / name)
        held.clear()

    for name, tensor in tensors:
        assert name not in held, name
        held[name] = tensor.detach().cpu().contiguous()
        if sum(one.nbytes for one in held.values()) >= file_bytes:
            write()
    if held:
        write()
    return hashes


def write_replaced_file(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of replaced tensors, complete or not at all.

    Args:
        folder: the run's `weights/`.
        name: of the file.
        tensors: by their names in the base, on the CPU.
    """
    temporary = folder / f".{name}.partial"
    save_file(dict(tensors), temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    rename_durably(temporary, folder / name)


def read_replaced(run: Path, weights: Mapping[str, str], base: Checkpoint) -> dict[str, TensorEntry]:
    """A run's replaced tensors by name; their numbers are read when they are asked for.

    Args:
        run: the run's folder.
        weights: SHA-256 by file name, of the plan.
        base: the model whose tensors they replace.

    Raises:
        BrokenPlan: a file is missing or another one, or a tensor is not the base's, of another shape, or there twice.
    """
    found: dict[str, TensorEntry] = {}
    for name, sha256 in weights.items():
        path = run / WEIGHTS_FOLDER / name
        if Path(name).name != name:
            raise _broken(run, f"names of files in {WEIGHTS_FOLDER}/", f"{name!r:.80}")
        if not path.is_file() or file_sha256(path) != sha256:
            raise _broken(
                path,
                f"the file of the training (SHA-256 {sha256[:12]}...)",
                "another content" if path.is_file() else "no such file",
            )
        try:
            entries = read_header(path)
        except BrokenCheckpoint as error:
            raise _broken(path, error.expected, error.found) from error
        for tensor, entry in entries.items():
            # A tied base's head may part from its embedding, by which it is as large.
            stored = base.tensors.get(f"{EMBEDDING}.weight" if base.tied and tensor == f"{HEAD}.weight" else tensor)
            if stored is None or stored.shape != entry.shape:
                wanted = "a tensor of the base" if stored is None else f"{tensor} of shape {stored.shape}, the base's"
                raise _broken(path, wanted, f"{tensor!r:.80}" if stored is None else f"{entry.shape}")
            if tensor in found:
                raise _broken(path, f"the tensor {tensor} once", f"another one in {found[tensor].shard.name}")
            found[tensor] = entry
    return found


def _broken(subject: Path, expected: str, found: str) -> BrokenPlan:
    return BrokenPlan(subject, expected=expected, found=found, fix=_FIX)
