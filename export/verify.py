"""Judge an export long after it was made: are these the files of then, and are they still the trained model?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch

from pat_serve.architectures import HIDDEN
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, MissingModel, UnsupportedModel, first_line
from pat_serve.export.hashes import hash_files
from pat_serve.export.parity import Parity, measure_parity
from pat_serve.export.reader import Run, open_run
from pat_serve.export.rounding import check_rounding
from pat_serve.locate import read_config
from pat_serve.plan import BaseReference
from pat_serve.scores import Scorer

RECORD = "pat_export.json"
_DTYPES = {"float32", "float16", "bfloat16", "float64"}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        folder: the export.
        files: names of the files whose hashes are those of the export; empty where the export recorded none.
        parity: measured now.
    """

    folder: Path
    files: list[str]
    parity: Parity

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "passed": self.parity.passed,
            "folder": str(self.folder),
            "files": self.files,
            "parity": self.parity.as_dict(),
        }


class _Record(pydantic.BaseModel):
    """The part of pat_export.json that is checked."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    version: int = pydantic.Field(ge=1, le=1)
    dtype: str
    base: BaseReference
    kept_channels: list[int]
    files: dict[str, str] = {}


def verify_export(
    folder: Path, ckpt: Path, *, base: str | None = None, walk: bool | None = None, scorer: Scorer | None = None
) -> Verification:
    """Check an export's files against what it recorded, and its function against the run that it comes from.

    Args:
        folder: the export.
        ckpt: the finished run.
        base: where the base lies now, if it was moved.
        walk: measure layer by layer; None decides by the memory that is there.
        scorer: asks vLLM.

    Returns:
        the outcome; its parity may have failed.

    Raises:
        MissingModel: no export.
        BrokenCheckpoint: a file is missing or another one than was exported.
        BrokenPlan: the export comes from another run.
        ParityError: a tensor is not the rewriting's nearest value, or stock transformers does not load the files.
        PatServeError: as for an export.
    """
    record = _read_record(folder)
    files = _check_files(folder, record)
    if read_config(folder).get("quantization_config") or record.dtype not in _DTYPES:
        raise UnsupportedModel(
            folder,
            expected="an export in float32, bfloat16 or float16",
            found="a quantized one, whose distance from the trained model is no rounding of single weights",
            fix="Verify the unquantized export that it was made from, and compare perplexities with pat-eval.",
        )
    run = open_run(ckpt, base)
    _check_origin(folder, record, run)
    target = getattr(torch, record.dtype)
    if target.itemsize < torch.float32.itemsize:
        check_rounding(run, folder, target, folder, same_machine=False)
    return Verification(
        folder=folder, files=files, parity=measure_parity(run, folder, target, walk=walk, scorer=scorer)
    )


def _read_record(folder: Path) -> _Record:
    path = folder / RECORD
    if not path.is_file():
        raise MissingModel(
            folder,
            expected=f"an export, with {RECORD} in it",
            found="a folder without one" if folder.is_dir() else "no such folder",
            fix="Give the folder that pat-export --out wrote.",
        )
    try:
        return _Record.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise BrokenCheckpoint(
            path, expected="the record of an export, version 1", found=first_line(error), fix="Export again."
        ) from error


def _check_files(folder: Path, record: _Record) -> list[str]:
    if not record.files:
        return []
    found = hash_files(folder)
    for name in sorted(record.files.keys() | found.keys()):
        if found.get(name) != record.files.get(name):
            was = record.files.get(name)
            raise BrokenCheckpoint(
                folder / name,
                expected=f"the file that was exported (SHA-256 {was[:12]}...)" if was else "no such file",
                found=f"{found[name][:12]}..." if name in found else "no such file",
                fix="Copy the export again, or export again.",
            )
    return sorted(found)


def _check_origin(folder: Path, record: _Record, run: Run) -> None:
    same_base = record.base.sha256 == run.plan.base.sha256
    if not same_base or record.kept_channels != run.plan.axes[HIDDEN].kept.tolist():
        raise BrokenPlan(
            run.folder,
            expected=f"the run that {folder} was exported from",
            found="one with other kept channels" if same_base else "one with another base",
            fix="Give that run with --ckpt.",
        )
