"""Judge an export long after it was made: are these the files of then, and are they still the trained model?"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch

from pat_serve.checkpoints.locate import read_config
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, MissingModel, UsageError, first_line
from pat_serve.export.files.model_files import write_model
from pat_serve.export.formats.check import check_quantized
from pat_serve.export.formats.quality import QuantizationQuality, measure_quality, require_compressed_tensors
from pat_serve.export.formats.schemes import SCHEMES, Scheme, quantization_config
from pat_serve.export.parity.comparison import Parity
from pat_serve.export.parity.gate import measure_parity
from pat_serve.export.parity.prompts import own_prompts
from pat_serve.export.rewrite.contents import shapes_of
from pat_serve.export.run.hashes import hash_files
from pat_serve.export.run.reader import Run, open_run
from pat_serve.files.disk import check_room
from pat_serve.run.plan import BaseReference
from pat_serve.scores import Scorer

RECORD = "pat_export.json"
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Findings of a verification.

    Attributes:
        folder: the export.
        files: names of the files whose hashes are those of the export; empty where the export recorded none.
        parity: measured now; of a quantised export that of the float32 weights which it was rounded from.
        quality: what quantisation costs, measured now; None for an export that is not quantised.
    """

    folder: Path
    files: list[str]
    parity: Parity
    quality: QuantizationQuality | None = None

    def as_dict(self) -> dict[str, Any]:
        """The findings as JSON has them (`pat-export verify --json`)."""
        return {
            "passed": self.parity.passed and (self.quality is None or self.quality.passed),
            "folder": str(self.folder),
            "files": self.files,
            "parity": self.parity.as_dict(),
            "quality": self.quality and self.quality.as_dict(),
        }

    def require(self) -> None:
        """Raise unless all is well.

        Raises:
            ParityError: with the figures that are out of tolerance.
        """
        fix = "Export again; if the new export passes, these files were changed."
        self.parity.require(self.folder, another=fix, rounded=fix)
        if self.quality is not None:
            self.quality.require(self.folder, fix)


class _Quantization(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    scheme: Literal["int8", "int4", "fp8"]
    group_size: int | None = pydantic.Field(default=None, ge=2)

    @property
    def written(self) -> Scheme:
        """The scheme, with the groups of this export."""
        scheme = SCHEMES[self.scheme]
        return scheme if self.group_size is None else scheme.in_groups(self.group_size)


class _Record(pydantic.BaseModel):
    """The part of pat_export.json that is checked."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    version: int = pydantic.Field(ge=1, le=2)
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    base: BaseReference
    cuts: dict[str, list[int]]
    quantization: _Quantization | None = None
    files: dict[str, str] = {}
    # Earlier exports have the nearest values.
    rounding: Literal["nearest", "stochastic"] = "nearest"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _today(cls, record: Any) -> Any:
        """Version 1 could cut the hidden axis alone."""
        if isinstance(record, dict) and record.get("version") == 1:
            return record | {"cuts": {HIDDEN: record.get("kept_channels")}}
        return record


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
        ParityError: a tensor is not the rewriting, rounded, or stock transformers does not load the files.
        PatServeError: as for an export.
    """
    record = _read_record(folder)
    files = _check_files(folder, record)
    scheme = record.quantization.written if record.quantization else None
    _check_scheme(folder, scheme)
    if scheme:
        if scorer is not None:
            raise UsageError("--vllm", expected="an export in floats", found=scheme.name, fix="Leave it out.")
        require_compressed_tensors()
    run = open_run(ckpt, base)
    _check_origin(folder, record, run)
    model_dtype = getattr(torch, record.dtype)
    if scheme:
        parity, quality = _measure_quantized(run, folder, scheme, model_dtype, walk)
        return Verification(folder=folder, files=files, parity=parity, quality=quality)
    stochastic = record.rounding == "stochastic"
    parity = measure_parity(
        run, folder, model_dtype, walk=walk, scorer=scorer, same_machine=False, stochastic=stochastic
    )
    return Verification(folder=folder, files=files, parity=parity)


def _check_scheme(folder: Path, scheme: Scheme | None) -> None:
    """config.json tells loaders to read the weights in the way in which they were written."""
    wanted = quantization_config(scheme) if scheme else None
    found = read_config(folder).get("quantization_config")
    if found != wanted:
        raise BrokenCheckpoint(
            folder / "config.json",
            expected=f"the quantization_config of {scheme.name}" if scheme else f"none, as {RECORD} says",
            found="none" if found is None else f"{found!r:.80}",
            fix="Copy the export again, or export again.",
        )


def _measure_quantized(
    run: Run, folder: Path, scheme: Scheme, model_dtype: torch.dtype, walk: bool | None
) -> tuple[Parity, QuantizationQuality]:
    """Repeat the export's gate: exact float32 weights against the trained model, quantised ones against these."""
    check_quantized(run, folder, scheme, model_dtype)
    with tempfile.TemporaryDirectory(prefix="pat-verify-") as scratch:
        exact = Path(scratch)
        needed_bytes = sum(prod(shape) for shape in shapes_of(run).values()) * torch.float32.itemsize
        check_room(exact, needed_bytes, "Free some space, or name another place in TMPDIR.")
        write_model(run, exact, torch.float32, _SHARD_BYTES, model_dtype=model_dtype)
        parity = measure_parity(run, exact, torch.float32, model_dtype=model_dtype, walk=walk)
        return parity, measure_quality(exact, folder, scheme, own_prompts(run))


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
            path, expected="the record of an export, version 1 or 2", found=first_line(error), fix="Export again."
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
    if not same_base or record.cuts != {line: cut.kept.tolist() for line, cut in run.plan.cuts.items()}:
        raise BrokenPlan(
            run.folder,
            expected=f"the run that {folder} was exported from",
            found="one with other cuts" if same_base else "one with another base",
            fix="Give that run with --ckpt.",
        )
