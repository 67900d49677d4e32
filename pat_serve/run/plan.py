"""PruningPlan: the seam between training and export.

Training writes a plan, export reads it, and neither knows the other. A pruning method is anything that produces a plan
and tuned weights: the kept indices of each named axis, and the operators to be folded into the base's weights.

On disk a plan is `plan.json` (readable, checked against a schema) beside `plan.safetensors` (its arrays), which the
JSON names by SHA-256. Both are written after everything else of a run, so a folder with a plan is a finished run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from safetensors.torch import save_file
from torch import Tensor

from pat_serve.checkpoints.shards import read_header
from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.cuts import AxisCut, Cuts, parse_line
from pat_serve.cut.hybrid import HybridFold
from pat_serve.cut.pattern import Pattern
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, first_line
from pat_serve.files.atomic import rename_durably, write_text
from pat_serve.files.strict_json import parse
from pat_serve.run.arrays import (
    ARRAY_DTYPES,
    StoredFolds,
    broken_plan,
    check_finite,
    check_rotation,
    read_kept,
    stored_array,
)

PLAN_JSON = "plan.json"
PLAN_ARRAYS = "plan.safetensors"


def _known_pattern(pattern: str) -> str:
    Pattern.parse(pattern)
    return pattern


# The pattern of a weight's zeros: "unstructured", or N:M.
Sparsity = Annotated[str, pydantic.AfterValidator(_known_pattern)]


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
    """Everything that an export replaces, turns, tunes, folds and cuts.

    A model is made of a plan in this order, each step on what the ones before left:

    1. stored: the base's tensors.
    2. rotated: `rotation` turns the residual stream, and the norms over it give their gains to their readers.
    3. replaced: `weights` take the place of the turned model's tensors of the same names, in the base's shapes.
    4. norms: trained gains take the place of the turned model's.
    5. adapter: LoRA is merged.
    6. fold: the operators follow the modules that write to the stream.
    7. cut: what `cuts` does not keep is left out.

    Attributes:
        method: name of the training method.
        base: the model that the indices refer to.
        cuts: kept indices by line (`hidden`, `layers`, `ffn.7`, `kv_groups.7`), of the turned stream where it is
            turned; an axis without a line is whole.
        folds: operators by the dotted name of the module that they follow. A loaded plan's are read from disk when
            they are asked for: those of a large model are gigabytes.
        rotation: orthogonal Q (D, D); None where the stream stays as it is.
        tied: a tied base's head stays tied under the rotation. Embedding and head are E Q, and the last norm has the
            gain of `norms`, which no head takes. The function stays the base's where that gain is constant on all
            channels but those that Q leaves alone.
        adapter: SHA-256 by file name of the LoRA adapter in `adapter/`; empty for none. Without it an export and its
            parity gate would both trust a damaged adapter.
        norms: trained gains (D,) by the dotted name of their RMSNorm, in the form that the base stores (Gemma: w of
            1 + w). A norm without a line keeps its own.
        weights: SHA-256 by file name of the replaced tensors in `weights/` (`pat_serve.run.replaced`).
        sparsity: what pattern of zeros a module's weight has after all that, by dotted name. The weights themselves
            hold the zeros; an export counts them.
    """

    method: str
    base: BaseReference
    cuts: Cuts = field(default_factory=Cuts)
    folds: Mapping[str, HybridFold] = field(default_factory=dict)
    rotation: Tensor | None = None
    tied: bool = False
    adapter: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    sparsity: dict[str, Sparsity] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write plan.safetensors, then plan.json; each is complete or absent."""
        arrays: dict[str, Tensor] = {f"cuts.{line}": cut.kept for line, cut in self.cuts.items()}
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
            cuts={line: _Line(width=cut.width, kept=len(cut.kept)) for line, cut in self.cuts.items()},
            folds=sorted(self.folds),
            rotated=self.rotation is not None,
            tied=self.tied,
            norms=sorted(self.norms),
            adapter=self.adapter,
            weights=self.weights,
            sparsity=self.sparsity,
            arrays_sha256=file_sha256(folder / PLAN_ARRAYS),
        )
        write_text(folder / PLAN_JSON, document.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> PruningPlan:
        """Read and check a plan.

        Raises:
            BrokenPlan: a file is missing, damaged or contradicts the other.
        """
        document, prefix = _read_document(folder / PLAN_JSON)
        path = folder / PLAN_ARRAYS
        if not path.is_file():
            raise broken_plan(path, "the plan's arrays", "no such file")
        if file_sha256(path) != document.arrays_sha256:
            raise broken_plan(path, f"the file that {PLAN_JSON} names by its SHA-256", "another content")
        try:
            entries = read_header(path, ARRAY_DTYPES)
        except BrokenCheckpoint as error:
            raise broken_plan(path, error.expected, error.found) from error
        names = {line: f"{prefix}.{line}" for line in document.cuts}
        lines = {}
        for line, told in document.cuts.items():
            kept = read_kept(path, names[line], line, told.kept, told.width, entries)
            lines[line] = AxisCut(width=told.width, kept=kept)
        folds = StoredFolds(path, document.folds, entries)
        rotation = stored_array(path, "rotation", entries, (None, None)).read() if document.rotated else None
        norms = {module: stored_array(path, f"norms.{module}", entries, (None,)).read() for module in document.norms}
        expected = {*names.values(), *folds.arrays(), *(["rotation"] if document.rotated else [])}
        expected |= {f"norms.{module}" for module in norms}
        if set(entries) != expected:
            difference = sorted(set(entries) ^ expected)[0]
            raise broken_plan(path, f"the arrays that {PLAN_JSON} names and no others", f"a difference: {difference}")
        folds.check()
        for module, gain in norms.items():
            check_finite(path, f"norms.{module}", gain)
        if rotation is not None:
            check_rotation(path, rotation)
        return PruningPlan(
            method=document.method,
            base=document.base,
            cuts=Cuts(lines),
            folds=folds,
            rotation=rotation,
            tied=document.tied,
            adapter=document.adapter,
            norms=norms,
            weights=document.weights,
            sparsity=document.sparsity,
        )


class _Line(pydantic.BaseModel):
    """A line of the cuts in plan.json; its indices are among the arrays."""

    model_config = pydantic.ConfigDict(extra="forbid")

    width: int = pydantic.Field(gt=0)
    kept: int = pydantic.Field(gt=0)


class _Common(pydantic.BaseModel):
    """The fields that plan.json has in every version."""

    model_config = pydantic.ConfigDict(extra="forbid")

    method: str
    base: BaseReference
    folds: list[str]
    rotated: bool = False
    norms: list[str] = []
    adapter: dict[str, str]
    arrays_sha256: str


class _Document(_Common):
    """The content of plan.json, in the present version."""

    version: Literal[2] = 2
    cuts: dict[str, _Line]
    tied: bool = False
    weights: dict[str, str] = {}
    sparsity: dict[str, Sparsity] = {}


class _DocumentOfVersion1(_Common):
    """plan.json as it was while the hidden axis alone could be cut."""

    version: Literal[1] = 1
    axes: dict[str, _Line]

    def today(self) -> _Document:
        """The same in the present version."""
        return _Document(**self.model_dump(exclude={"version", "axes"}), cuts=self.axes)


def _read_document(path: Path) -> tuple[_Document, str]:
    """A plan.json of any version, and what the names of the kept indices' arrays begin with."""
    expected = "a plan of version 1 or 2"
    try:
        parsed = parse(path.read_bytes())
        if isinstance(parsed, dict) and "cuts" in parsed and parsed.get("version") == 1:
            raise broken_plan(path, "version 2 in a plan with cuts of any axis", "version 1")
        if isinstance(parsed, dict) and "axes" in parsed and parsed.get("version", 1) == 1:
            document, prefix = _DocumentOfVersion1.model_validate(parsed).today(), "axes"
        else:
            document, prefix = _Document.model_validate(parsed), "cuts"
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the document"
        raise broken_plan(path, expected, f"{where}: {fault['msg']}") from error
    except (OSError, ValueError) as error:
        raise broken_plan(path, expected, first_line(error)) from error
    if prefix == "axes" and (others := sorted(set(document.cuts) - {HIDDEN})):
        raise broken_plan(path, f"a cut of {HIDDEN} alone in a plan of version 1", f"one of {others[0]!r:.80}")
    try:
        for line in document.cuts:
            parse_line(line)
    except BrokenPlan as error:
        raise broken_plan(path, error.expected, error.found) from error
    return document, prefix


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
