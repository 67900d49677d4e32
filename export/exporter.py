"""The export from end to end: open, check, write, prove, rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pat_serve.checkpoints.locate import check_inside
from pat_serve.checkpoints.shards import require_no_pattern
from pat_serve.errors import DataError, UsageError
from pat_serve.export.files.ends import add_end_tokens
from pat_serve.export.files.model_files import dtype_name as _name
from pat_serve.export.files.model_files import remove_weights
from pat_serve.export.files.model_files import write_model as _write_model
from pat_serve.export.formats.calibrated import Calibration, bounded
from pat_serve.export.formats.gguf import require_gguf, write_gguf
from pat_serve.export.formats.quality import QuantizationQuality, require_compressed_tensors
from pat_serve.export.formats.quantize import quantize_export
from pat_serve.export.formats.schemes import scheme_named
from pat_serve.export.parity.comparison import Parity
from pat_serve.export.parity.gate import measure_parity
from pat_serve.export.parity.prompts import own_prompts
from pat_serve.export.parity.report import parity_lines
from pat_serve.export.record.card import model_card, provenance
from pat_serve.export.record.card_sections import quality_section
from pat_serve.export.record.zeros import count_zeros
from pat_serve.export.rewrite.config import exported_config
from pat_serve.export.rewrite.contents import shapes_of
from pat_serve.export.rewrite.dry_run import dry_run
from pat_serve.export.rewrite.shape_check import check_fitness, group_size_of
from pat_serve.export.run.base_files import BaseFiles
from pat_serve.export.run.hashes import hash_files
from pat_serve.export.run.reader import Run, open_run
from pat_serve.files.atomic import check_vacant, new_folder
from pat_serve.files.disk import check_room, room_on_disk
from pat_serve.scores import Scorer
from pat_serve.terminal.progress import say

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
ROUNDINGS = ("auto", "nearest", "stochastic")

# Everything of the base that is neither weights nor config: tokenizer, chat template, generation config, licence.
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip


# Config, tokenizer, card, and what file systems round up.
_SPARE_BYTES = 64_000_000
_ROOM = "Free some space, or choose another --out."
_FREE = "Free some space, or choose another --out; nothing was left behind."


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished export: its folder, its record and the gate's findings."""

    out: Path
    record: dict[str, Any]
    parity: Parity | None
    quality: QuantizationQuality | None = None


def export_run(
    ckpt: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    parity: bool = True,
    walk: bool | None = None,
    scorer: Scorer | None = None,
    force: bool = False,
    quantize: str | None = None,
    tp: tuple[int, ...] = (),
    gguf: bool = False,
    calibration: Calibration | None = None,
    accept: Callable[[Path, Path], dict[str, Any]] | None = None,
    rounding: str = "auto",
) -> Exported:
    """Rewrite a run's base as a standard narrower checkpoint.

    Args:
        ckpt: a finished run.
        out: the new folder; it appears only when everything, the parity gate included, went well.
        base: where the base lies now, if it was moved.
        dtype: of the written weights; "auto" keeps the base's.
        max_shard_bytes: size of a weight file at most.
        parity: measure the exported files against the trained model, and refuse them when they differ.
        walk: measure layer by layer; None decides by the memory that is there.
        scorer: asks vLLM, for its part of the parity; None leaves it out.
        force: replace `out`.
        quantize: "int8", "int4" or "fp8" for the decoder's linears; `dtype` is then that of everything else.
        tp: tensor-parallel degrees that the model has to serve at.
        gguf: write model.gguf too.
        calibration: what int4 rounds the weights for; None takes the run's own prompts, which are few.
        accept: looks at the finished model, given its folder and the base's, and raises when it shall not be; what it
            returns, pat-eval's report as JSON, goes into the record and the card.
        rounding: of 16-bit files: "nearest" values, "stochastic", or "auto": the nearest, unless they lose what the
            training moved (`parity/gate.py`); without a measured parity nobody can tell, and they are taken.

    Raises:
        PatServeError: anything that a user can mend; `out` is as it was then.
    """
    check_vacant(out, force=force, inputs=[ckpt, *([Path(base)] if base else [])])
    if dtype not in ("auto", *DTYPES):
        raise UsageError("--dtype", expected=f"auto, {', '.join(DTYPES)}", found=dtype, fix="Choose one of them.")
    if rounding not in ROUNDINGS:
        raise UsageError("--rounding", expected=", ".join(ROUNDINGS), found=rounding, fix="Choose one of them.")
    scheme = scheme_named(quantize) if quantize else None
    if scheme and scorer is not None:
        raise UsageError(
            "--parity-vllm", expected="unquantized files", found=f"--quantize {quantize}", fix="Leave one of them out."
        )
    if scorer is not None:
        require_no_pattern(out.resolve())
    if scheme and parity:
        require_compressed_tensors()
    run = open_run(ckpt, base, hash_weights=False)
    check_vacant(out, force=force, inputs=[run.base.folder])
    # A licence that is a link to somebody's key would be published with the model.
    check_inside(run.base.folder, _carried(run))
    fitness = check_fitness(run, tp, scheme)
    if scheme and scheme.calibrated:
        scheme = scheme.in_groups(group_size_of(run, tp))
    model_dtype = run.base.dtype if dtype == "auto" else DTYPES[dtype]
    if gguf:
        require_gguf(exported_config(run, model_dtype), run.base.folder, quantized=scheme is not None)
    calibrated = _calibration(run, calibration) if scheme and scheme.calibrated else None
    # Quantised weights are made from the exact float32 ones, which are proven first.
    file_dtype = torch.float32 if scheme else model_dtype
    if rounding == "stochastic" and file_dtype.itemsize > 2:
        raise UsageError(
            "--rounding stochastic",
            expected="files of 16 bits",
            found=f"--quantize {quantize}" if scheme else _name(file_dtype),
            fix="Leave --rounding out: a quantized weight has its scheme's own rounding."
            if scheme
            else "Leave --rounding out, or export with --dtype bfloat16.",
        )
    with ExitStack() as stack:
        base_files = stack.enter_context(BaseFiles(run))
        copies = [file_dtype, *([model_dtype] if scheme else []), *([model_dtype] if gguf else [])]
        _check_fits(run, out, copies)
        stack.enter_context(room_on_disk(out, lambda: _FREE))
        staging = stack.enter_context(new_folder(out, replace=force))

        def write(stochastic: bool) -> dict[str, str]:
            return _write_model(
                run,
                staging,
                file_dtype,
                max_shard_bytes,
                model_dtype=model_dtype,
                meanwhile=base_files.poll,
                stochastic=stochastic,
            )

        stochastic = rounding == "stochastic"
        hashes = write(stochastic)

        def write_again() -> None:
            nonlocal stochastic, hashes
            say(f"nearest values in {_name(file_dtype)} lose what the training moved: written again, rounded by chance")
            remove_weights(staging)
            stochastic, hashes = True, write(True)

        outcome = None
        if parity:
            outcome = measure_parity(
                run,
                staging,
                file_dtype,
                out=out,
                model_dtype=model_dtype,
                walk=walk,
                scorer=scorer,
                stochastic=stochastic,
                write_again=write_again if rounding == "auto" else None,
            )
            _require(outcome, out)
        sparsity = count_zeros(run, staging)
        quality = None
        if scheme:
            prompts = calibrated[1] if calibrated else []
            quality = quantize_export(run, staging, scheme, model_dtype, max_shard_bytes, out, parity, prompts)
        _carry_files(run, staging)
        add_end_tokens(run, staging)
        if gguf:
            write_gguf(staging)
        kept = {"quality": accept(staging, run.base.folder)} if accept else {}
        record = provenance(run, _name(model_dtype), outcome, scheme, quality, fitness) | kept
        record["sparsity"] = sparsity
        record["rounding"] = "stochastic" if stochastic else "nearest"
        if calibrated:
            record["quantization"]["calibration"] = _told(*calibrated)
        record["files"] = hash_files(staging, {} if scheme else hashes)
        (staging / "pat_export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        measured = quality_section(record["quality"]) if kept else None
        (staging / "README.md").write_text(model_card(record, measured), encoding="utf-8")
        base_files.require()
    return Exported(out=out, record=record, parity=outcome, quality=quality)


def _calibration(run: Run, given: Calibration | None) -> tuple[str, list[list[int]]]:
    """The name of a calibration's source, and its prompts.

    Raises:
        DataError: there are none.
    """
    if given is None:
        return "the run's own prompts", bounded(own_prompts(run))
    # A tokenizer may have tokens without a row in the embedding.
    known = [prompt for prompt in given.prompts(run.base.folder) if max(prompt, default=0) < run.base.sizes.vocab]
    prompts = bounded(known)
    if not prompts:
        raise DataError(given.source, expected="text to calibrate on", found="none", fix="Give other --calibration.")
    return given.source, prompts


def _told(source: str, prompts: list[list[int]]) -> dict[str, Any]:
    return {"source": source, "prompts": len(prompts), "tokens": sum(map(len, prompts))}


def _require(outcome: Parity, out: Path) -> None:
    """Show that the written files are the trained model.

    Raises:
        ParityError: they are not.
    """
    if not outcome.passed:
        say("\n".join(parity_lines(outcome)))
    outcome.require(
        out,
        another="Nothing was exported: the files would be another model than was trained, whatever --dtype. Report it.",
        rounded="Nothing was exported.",
    )


def _check_fits(run: Run, out: Path, dtypes: list[torch.dtype]) -> None:
    """The dry run: every tensor comes out as planned, and the disk has room for all that will be written.

    Args:
        run: the run.
        out: where it goes.
        dtypes: one for each copy of the weights that will be there at the same time.
    """
    dry_run(run, dtypes[0])
    numbers = sum(prod(shape) for shape in shapes_of(run).values())
    check_room(out.parent, sum(numbers * dtype.itemsize for dtype in dtypes) + _SPARE_BYTES, _ROOM)


def _carried(run: Run) -> list[Path]:
    return [path for pattern in _CARRIED for path in run.base.folder.glob(pattern) if path.is_file()]


def _carry_files(run: Run, folder: Path) -> None:
    for path in _carried(run):
        copy = folder / path.relative_to(run.base.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
