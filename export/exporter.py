"""The export from end to end: open, check, write, prove, rename."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pat_serve.architectures import HIDDEN
from pat_serve.atomic import check_vacant, new_folder
from pat_serve.errors import IllegalWidth, UsageError
from pat_serve.export.card import model_card, provenance
from pat_serve.export.hashes import hash_files
from pat_serve.export.narrow import narrow_config, narrow_shapes, narrow_tensors
from pat_serve.export.parity import Parity, measure_parity
from pat_serve.export.reader import Run, open_run
from pat_serve.export.rounding import check_rounding
from pat_serve.export.writer import index_document, plan_shards, shard_names, write_shard
from pat_serve.geometry import legal_step
from pat_serve.progress import progress_bar
from pat_serve.scores import Scorer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Everything of the base that is neither weights nor config: tokenizer, chat template, generation config, licence.
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip


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
    walk: bool | None = None,
    scorer: Scorer | None = None,
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
        walk: measure layer by layer; None decides by the memory that is there.
        scorer: asks vLLM, for its part of the parity; None leaves it out.
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
    with new_folder(out) as staging:
        _write_model(run, staging, target, max_shard_bytes)
        outcome = _prove(run, staging, target, out, walk=walk, scorer=scorer) if parity else None
        _carry_files(run, staging)
        record = provenance(run, _name(target), outcome) | {"files": hash_files(staging)}
        (staging / "pat_export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(model_card(record), encoding="utf-8")
    return Exported(out=out, record=record, parity=outcome)


def _prove(
    run: Run, staging: Path, target: torch.dtype, out: Path, *, walk: bool | None, scorer: Scorer | None
) -> Parity:
    """Show that the written files are the trained model.

    Returns:
        parity of the files as they are, rounding included.

    Raises:
        ParityError: they are not.
    """
    if target not in (torch.float32, torch.float64):
        check_rounding(run, staging, target, out)
    outcome = measure_parity(run, staging, target, walk=walk, scorer=scorer)
    outcome.require(out, "Nothing was exported: the files would not be the model that was trained.")
    return outcome


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


def _write_model(run: Run, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shapes = narrow_shapes(run)
    shards = plan_shards(shapes, dtype, max_shard_bytes)
    files = shard_names(len(shards))
    with progress_bar() as progress:
        task = progress.add_task("write tensors", total=len(shapes))
        for file, names in zip(files, shards, strict=True):
            tensors = progress.track(narrow_tensors(run, names, dtype), total=len(names), task_id=task)
            write_shard(folder / file, {name: shapes[name] for name in names}, dtype, tensors)
    config = json.dumps(narrow_config(run, dtype), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    if len(files) > 1:
        document = json.dumps(index_document(shards, shapes, dtype), indent=2)
        (folder / "model.safetensors.index.json").write_text(document + "\n", encoding="utf-8")


def _carry_files(run: Run, folder: Path) -> None:
    for pattern in _CARRIED:
        for path in run.base.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
