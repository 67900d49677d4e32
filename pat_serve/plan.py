"""PruningPlan: the seam between training and export.

Training writes a plan, export reads it, and neither knows the other. A pruning method is anything that produces a plan
and tuned weights: the kept indices of each named axis, and the operators to be folded into the base's weights.

On disk a plan is `plan.json` (readable, checked against a schema) beside `plan.safetensors` (its arrays), which the
JSON names by SHA-256. Both are written after everything else of a run, so a folder with a plan is a finished run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor

from pat_serve.checkpoints.shards import DTYPES, TensorEntry, read_header
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, first_line
from pat_serve.files.atomic import rename_durably, write_text
from pat_serve.files.strict_json import parse
from pat_serve.hybrid import HybridFold

PLAN_JSON = "plan.json"
PLAN_ARRAYS = "plan.safetensors"
_DTYPES = DTYPES | {"I64": torch.int64}
_FLOATS = frozenset(DTYPES.values())


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
    """The model that a run started from, precise enough to notice when it is another one.

    Attributes:
        source: a folder, a GGUF file or a hub id.
        revision: the hub's commit.
        architecture: the stock class.
        sha256: by file name, of every file that decides what it computes.
        gguf_sha256: of the GGUF file that those were read from, if there is one.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    source: str
    revision: str | None = None
    architecture: str
    sha256: dict[str, str]
    gguf_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What to cut and what to fold.

    Attributes:
        method: name of the training method.
        base: the model that the indices refer to.
        axes: kept indices by axis name (`hidden`, `layers`, `ffn.{i}`, `heads.{i}`); an axis without a line is whole.
        folds: operators by the dotted name of the module that they follow. A loaded plan's are read from disk when
            they are asked for: those of a large model are gigabytes.
        rotation: orthogonal Q (D, D) that the base's residual stream is turned by before anything else is applied;
            axes, folds and adapter refer to the turned stream. None where it stays as it is.
        adapter: SHA-256 by file name of the LoRA adapter in `adapter/` that is to be merged before folding; empty for
            none. Without it an export and its parity gate would both trust a damaged adapter.
        norms: trained gains (D,) by the dotted name of their RMSNorm, in the form that the base stores (Gemma: w of
            1 + w). They take the place of the base's, of the turned base's where there is a rotation; a norm without a
            line keeps its own.
    """

    method: str
    base: BaseReference
    axes: dict[str, AxisCut] = field(default_factory=dict)
    folds: Mapping[str, HybridFold] = field(default_factory=dict)
    rotation: Tensor | None = None
    adapter: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

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
        arrays |= {f"norms.{module}": gain for module, gain in self.norms.items()}
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
            norms=sorted(self.norms),
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
        path = folder / PLAN_JSON
        try:
            document = _Document.model_validate(parse(path.read_bytes()))
        except pydantic.ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, fault["loc"])) or "the document"
            raise _broken(path, "a plan of version 1", f"{where}: {fault['msg']}") from error
        except (OSError, ValueError) as error:
            raise _broken(path, "a plan of version 1", first_line(error)) from error
        path = folder / PLAN_ARRAYS
        if not path.is_file():
            raise _broken(path, "the plan's arrays", "no such file")
        if file_sha256(path) != document.arrays_sha256:
            raise _broken(path, f"the file that {PLAN_JSON} names by its SHA-256", "another content")
        try:
            entries = read_header(path, _DTYPES)
        except BrokenCheckpoint as error:
            raise _broken(path, error.expected, error.found) from error
        axes = {name: _read_axis(path, name, axis, entries) for name, axis in document.axes.items()}
        folds = _StoredFolds(path, document.folds, entries)
        rotation = _stored(path, "rotation", entries, (None, None)).read() if document.rotated else None
        norms = {module: _stored(path, f"norms.{module}", entries, (None,)).read() for module in document.norms}
        expected = {*(f"axes.{name}" for name in axes), *folds.arrays(), *(["rotation"] if document.rotated else [])}
        expected |= {f"norms.{module}" for module in norms}
        if set(entries) != expected:
            difference = sorted(set(entries) ^ expected)[0]
            raise _broken(path, f"the arrays that {PLAN_JSON} names and no others", f"a difference: {difference}")
        folds.check()
        for module, gain in norms.items():
            _check_finite(path, f"norms.{module}", gain)
        if rotation is not None:
            _check_rotation(path, rotation)
        return PruningPlan(
            method=document.method,
            base=document.base,
            axes=axes,
            folds=folds,
            rotation=rotation,
            adapter=document.adapter,
            norms=norms,
        )


class _StoredFolds(Mapping[str, HybridFold]):
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
        """Names of all arrays."""
        return [name for site in self._sites for name in self._names(site)]

    def check(self) -> None:
        """Every operator is there, of matching shapes and finite; one is in memory at a time."""
        for site in self._sites:
            names = self._names(site)
            scale = _stored(self._path, names[2], self._entries, (None,))
            l0 = _stored(self._path, names[0], self._entries, (None, scale.shape[0]))
            _stored(self._path, names[1], self._entries, l0.shape[::-1])
            for name in names:
                _check_finite(self._path, name, self._entries[name].read())

    @staticmethod
    def _names(site: str) -> list[str]:
        return [f"folds.{site}.{part}" for part in ("l0", "l1", "scale")]


def _stored(path: Path, name: str, entries: dict[str, TensorEntry], shape: tuple[int | None, ...]) -> TensorEntry:
    """An array of floats of this shape; None stands for any length."""
    entry = entries.get(name)
    if entry is None:
        raise _broken(path, f"the array {name}", "no such array")
    fits = len(entry.shape) == len(shape) and all(
        want in (None, has) for want, has in zip(shape, entry.shape, strict=True)
    )
    if not fits or entry.dtype not in _FLOATS:
        raise _broken(path, f"{name} as floats", f"{entry.dtype}")
    return entry


def _read_axis(path: Path, name: str, axis: _Axis, entries: dict[str, TensorEntry]) -> AxisCut:
    entry = entries.get(f"axes.{name}")
    if entry is None or entry.dtype != torch.int64 or len(entry.shape) != 1:
        raise _broken(path, f"int64 indices for the axis {name}", "none" if entry is None else f"{entry.dtype}")
    kept = entry.read()
    in_order = len(kept) == axis.kept and bool((kept[1:] > kept[:-1]).all())
    if not in_order or int(kept[0]) < 0 or int(kept[-1]) >= axis.width:
        raise _broken(path, f"ascending indices below {axis.width} for the axis {name}", "other ones")
    return AxisCut(width=axis.width, kept=kept)


def _check_finite(path: Path, name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise _broken(path, f"finite numbers in {name}", "NaN or infinity")


def _check_rotation(path: Path, rotation: Tensor) -> None:
    """A matrix that is not orthogonal changes the model, and the parity gate applies the same one."""
    _check_finite(path, "rotation", rotation)
    width = len(rotation)
    if rotation.shape != (width, width):
        raise _broken(path, "a square rotation", f"shape {tuple(rotation.shape)}")
    probe = torch.randn(width, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(rotation.dtype)
    back = rotation.T @ (rotation @ probe)
    if float((back - probe).abs().max()) > 1e-2:
        raise _broken(path, "an orthogonal rotation", "another matrix")


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
    norms: list[str] = []
    adapter: dict[str, str]
    arrays_sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(path: Path, expected: str, found: str) -> BrokenPlan:
    return BrokenPlan(path, expected=expected, found=found, fix="Copy the run again, or repeat the training.")
