"""The export from end to end: open, check, write, prove, rename."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pat_serve.architectures import HIDDEN
from pat_serve.atomic import check_vacant, new_folder
from pat_serve.errors import DiskFull, IllegalWidth, UsageError
from pat_serve.export.card import model_card, provenance
from pat_serve.export.narrow import dry_run, narrow_config, narrow_shapes, rewriting_of
from pat_serve.export.parity import Parity, check_parity, check_rounding, trained_logits
from pat_serve.export.reader import Run, open_run
from pat_serve.export.writer import WeightFiles, index_document, write_blocks
from pat_serve.geometry import legal_step
from pat_serve.progress import byte_progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Everything of the base that is neither weights nor config: tokenizer, chat template, generation config, licence.
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip


# Config, tokenizer, card, and what file systems round up.
_SPARE_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export came to."""

    out: Path
    record: dict[str, Any]
    parity: Parity | None


def export_run(
    ckpt: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    parity: bool = True,
    force: bool = False,
) -> Exported:
    """Rewrite a run's base as a standard narrower checkpoint.

    Args:
        ckpt: a finished run.
        out: the new folder; it appears only when everything, the parity gate included, went well.
        base: where the base lies now, if it was moved.
        dtype: of the written weights; "auto" keeps the base's.
        max_shard_bytes: size of a weight file at most.
        parity: measure the exported files against the trained model, and refuse them when they differ.
        force: replace `out`.

    Raises:
        PatServeError: anything that a user can mend; `out` is as it was then.
    """
    check_vacant(out, force=force, inputs=[ckpt, *([Path(base)] if base else [])])
    if dtype not in ("auto", *DTYPES):
        raise UsageError("--dtype", expected=f"auto, {', '.join(DTYPES)}", found=dtype, fix="Choose one of them.")
    run = open_run(ckpt, base)
    check_vacant(out, force=force, inputs=[run.base.folder])
    _check_width(run)
    target = run.base.dtype if dtype == "auto" else DTYPES[dtype]
    _check_fits(run, out, [target, *([torch.float32] if parity and _is_rounded(target) else [])])
    with _room_on_disk(out), new_folder(out, replace=force) as staging:
        _write_model(run, staging, target, max_shard_bytes)
        outcome = _prove(run, staging, target, out) if parity else None
        _carry_files(run, staging)
        record = provenance(run, _name(target), outcome)
        (staging / "pat_export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(model_card(record), encoding="utf-8")
    return Exported(out=out, record=record, parity=outcome)


def _prove(run: Run, staging: Path, target: torch.dtype, out: Path) -> Parity:
    """Show that the written files are the trained model.

    The rewriting is held to float32's tolerance whatever the files' dtype: rounding to 16 bits hides a lost scale or an
    uncorrected eps. So for 16-bit files the float32 ones are written too, judged, and must round to those exactly.

    Returns:
        parity of the files as they are, rounding included.

    Raises:
        ParityError: they are not.
    """
    trained = trained_logits(run, torch.float64 if target == torch.float64 else torch.float32, target)
    if _is_rounded(target):
        exact = staging / ".float32"
        exact.mkdir()
        _write_model(run, exact, torch.float32, max_shard_bytes=2**62, runs_in=target)
        check_parity(run, exact, torch.float32, trained, target).require(out)
        check_rounding(exact, staging, target, out)
        shutil.rmtree(exact)
    outcome = check_parity(run, staging, target, trained, target)
    outcome.require(out)
    return outcome


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    """A disk that fills up all the same, since others write to it too, or a quota, is an error of its own."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            out,
            expected="a disk that takes all files",
            found=error.strerror or "no more room",
            fix="Free some space, or choose another --out; nothing was left behind.",
        ) from error


def _is_rounded(target: torch.dtype) -> bool:
    """Rounding to 16 bits hides mistakes of the rewriting."""
    return target not in (torch.float32, torch.float64)


def _check_width(run: Run) -> None:
    """The narrow config must be one that its class accepts; checked before a byte is written."""
    cut = run.plan.axes[HIDDEN]
    step = legal_step(run.base.num_attention_heads, hidden_multiple_of_heads=run.base.family.hidden_multiple_of_heads)
    if not cut.is_identity and len(cut.kept) % step:
        raise IllegalWidth(
            run.folder,
            expected=f"a kept width that is a multiple of {step}",
            found=str(len(cut.kept)),
            fix="Train again with a legal --hidden-size.",
        )


def _check_fits(run: Run, out: Path, dtypes: list[torch.dtype]) -> None:
    """The dry run: every tensor comes out as planned, and the disk has room for all that will be written."""
    dry_run(run, dtypes[0])
    numbers = sum(prod(shape) for shape in narrow_shapes(run).values())
    needed_bytes = sum(numbers * dtype.itemsize for dtype in dtypes) + _SPARE_BYTES
    place = next(path for path in out.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        proof = ", the float32 weights of the parity gate among them" if len(dtypes) > 1 else ""
        raise DiskFull(
            place,
            expected=f"{needed_bytes / 1e9:.2f} GB of free space{proof}",
            found=f"{free_bytes / 1e9:.2f} GB",
            fix="Free some space, or choose another --out.",
        )


def _write_model(
    run: Run, folder: Path, dtype: torch.dtype, max_shard_bytes: int, runs_in: torch.dtype | None = None
) -> None:
    shapes = narrow_shapes(run)
    rewriting = rewriting_of(run, dtype, runs_in)
    total_bytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
    with (
        WeightFiles(folder, shapes, dtype, max_shard_bytes) as files,
        byte_progress(f"write {_name(dtype)} weights", total_bytes) as advance,
    ):
        write_blocks(files, shapes, rewriting.blocks, advance)
    config = json.dumps(narrow_config(run, dtype), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    if len(files.shards) > 1:
        document = json.dumps(index_document(files.shards, shapes, dtype), indent=2)
        (folder / "model.safetensors.index.json").write_text(document + "\n", encoding="utf-8")


def _carry_files(run: Run, folder: Path) -> None:
    for pattern in _CARRIED:
        for path in run.base.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
