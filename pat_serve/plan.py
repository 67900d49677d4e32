"""PruningPlan: the seam between training and export.

Training writes a plan, export reads it, and neither knows the other. A pruning method is anything that produces a plan
and tuned weights: the kept indices of each named axis, and the operators to be folded into the base's weights.

On disk a plan is `plan.json` (readable, checked against a schema) beside `plan.safetensors` (its arrays), which the
JSON names by SHA-256. Both are written after everything else of a run, so a folder with a plan is a finished run.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import pydantic
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pat_serve.atomic import rename_durably, write_text
from pat_serve.errors import BrokenPlan, first_line
from pat_serve.hybrid import HybridFold

PLAN_JSON = "plan.json"
PLAN_ARRAYS = "plan.safetensors"


@dataclass(frozen=True, kw_only=True)
class AxisCut:
    """Which indices of a named axis stay.

    Attributes:
        width: length of the axis in the base.
        kept: int64 indices that stay, ascending, at least one.
    """

    width: int
    kept: Tensor

    def __post_init__(self) -> None:
        assert self.kept.dtype == torch.int64
        assert self.kept.dim() == 1

    @property
    def is_identity(self) -> bool:
        """Nothing is cut."""
        return len(self.kept) == self.width


class BaseReference(pydantic.BaseModel):
    """The model that a run started from, precise enough to notice when it is another one."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    source: str
    revision: str | None = None
    architecture: str
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What to cut and what to fold.

    Attributes:
        method: name of the training method.
        base: the model that the indices refer to.
        axes: kept indices by axis name (`hidden`, `layers`, `ffn.{i}`, `heads.{i}`); an axis without a line is whole.
        folds: operators by the dotted name of the module that they follow.
        rotation: orthogonal Q (D, D) that the base's residual stream is turned by before anything else is applied;
            axes, folds and adapter refer to the turned stream. None where it stays as it is.
        adapter: SHA-256 by file name of the LoRA adapter in `adapter/` that is to be merged before folding; empty for
            none. Without it an export and its parity gate would both trust a damaged adapter.
    """

    method: str
    base: BaseReference
    axes: dict[str, AxisCut] = field(default_factory=dict)
    folds: dict[str, HybridFold] = field(default_factory=dict)
    rotation: Tensor | None = None
    adapter: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write plan.safetensors, then plan.json; each is complete or absent."""
        arrays: dict[str, Tensor] = {f"axes.{name}": cut.kept for name, cut in self.axes.items()}
        for site, fold in self.folds.items():
            arrays |= {
                f"folds.{site}.l0": fold.l0_RD,
                f"folds.{site}.l1": fold.l1_DR,
                f"folds.{site}.scale": fold.scale_D,
            }
        if self.rotation is not None:
            arrays["rotation"] = self.rotation
        temporary = folder / f".{PLAN_ARRAYS}.partial"
        save_file({name: array.contiguous() for name, array in arrays.items()}, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        rename_durably(temporary, folder / PLAN_ARRAYS)
        document = _Document(
            method=self.method,
            base=self.base,
            axes={name: _Axis(width=cut.width, kept=len(cut.kept)) for name, cut in self.axes.items()},
            folds=sorted(self.folds),
            rotated=self.rotation is not None,
            adapter=self.adapter,
            arrays_sha256=file_sha256(folder / PLAN_ARRAYS),
        )
        write_text(folder / PLAN_JSON, document.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> PruningPlan:
        """Read and check a plan.

        Raises:
            BrokenPlan: a file is missing, damaged or contradicts the other.
        """
        try:
            document = _Document.model_validate_json((folder / PLAN_JSON).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _broken(folder / PLAN_JSON, "a plan of version 1", first_line(error)) from error
        path = folder / PLAN_ARRAYS
        if not path.is_file():
            raise _broken(path, "the plan's arrays", "no such file")
        if file_sha256(path) != document.arrays_sha256:
            raise _broken(path, f"the file that {PLAN_JSON} names by its SHA-256", "another content")
        arrays = load_file(path)
        axes = {name: AxisCut(width=axis.width, kept=arrays[f"axes.{name}"]) for name, axis in document.axes.items()}
        for name, cut in axes.items():
            kept = cut.kept
            in_order = len(kept) > 0 and bool((kept[1:] > kept[:-1]).all())
            if not in_order or int(kept[0]) < 0 or int(kept[-1]) >= cut.width or len(kept) != document.axes[name].kept:
                raise _broken(path, f"ascending indices below {cut.width} for the axis {name}", "other ones")
        folds = {
            site: HybridFold(
                l0_RD=arrays[f"folds.{site}.l0"],
                l1_DR=arrays[f"folds.{site}.l1"],
                scale_D=arrays[f"folds.{site}.scale"],
            )
            for site in document.folds
        }
        return PruningPlan(
            method=document.method,
            base=document.base,
            axes=axes,
            folds=folds,
            rotation=arrays["rotation"] if document.rotated else None,
            adapter=document.adapter,
        )


class _Axis(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    width: int = pydantic.Field(gt=0)
    kept: int = pydantic.Field(gt=0)


class _Document(pydantic.BaseModel):
    """plan.json."""

    model_config = pydantic.ConfigDict(extra="forbid")

    version: int = pydantic.Field(default=1, ge=1, le=1)
    method: str
    base: BaseReference
    axes: dict[str, _Axis]
    folds: list[str]
    rotated: bool = False
    adapter: dict[str, str]
    arrays_sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(path: Path, expected: str, found: str) -> BrokenPlan:
    return BrokenPlan(path, expected=expected, found=found, fix="Copy the run again, or repeat the training.")
