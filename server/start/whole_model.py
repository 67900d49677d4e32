"""Checks of a local model folder, before vLLM spends half a minute on it or ends in tracebacks."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from pat_serve.checkpoints.locate import stock_path
from pat_serve.checkpoints.shards import runtime_shards
from pat_serve.checkpoints.stock_class import check_stock_folder
from pat_serve.errors import BrokenCheckpoint, MissingModel, first_line

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)
# vLLM's names for tokenizers that transformers loads. vLLM's other modes look for other files.
_TOKENIZER_MODES = ("auto", "hf")


def check_whole_models(args: Namespace, model: str, *, baseline: str | None, draft: str | None) -> None:
    """Refuse folders whose weights are cut off, not there or not those of their config, and tokenizers that are broken.

    Args:
        args: vLLM's parsed arguments. With another format of weights than safetensors, or a tokenizer from elsewhere,
            the folders' own files are not looked at.
        model: as the user named it. A model from the hub is not looked at, since perhaps not all of it has come.
        baseline: its dense parent, whose engine takes no tokenizer but its own.
        draft: the model that proposes tokens; it needs no tokenizer.

    Raises:
        BrokenCheckpoint: a file is damaged, an index names one that is not there, or the config is of other weights.
        MissingModel: there are no weights, or there is no tokenizer.
        UnsupportedModel: vLLM would compute another function than transformers.
    """
    has_own = not args.skip_tokenizer_init and args.tokenizer_mode.lower() in _TOKENIZER_MODES
    for name, needs_tokenizer in ((model, has_own and args.tokenizer is None), (baseline, has_own), (draft, False)):
        folder = None if name is None else Path(stock_path(name))
        if folder is None or not folder.is_dir():
            continue
        if args.load_format == "safetensors":
            shards = check_weights(folder)
            if not args.hf_overrides:
                check_stock_folder(folder, shards)
        if needs_tokenizer:
            check_tokenizer(folder)


def check_weights(folder: Path) -> list[Path]:
    """Look at the headers and lengths of the files that vLLM will open; no weight is read.

    Returns:
        the files.

    Raises:
        BrokenCheckpoint: a file is damaged, or an index names a file that is not there.
        MissingModel: there is none.
    """
    from safetensors import SafetensorError, safe_open

    shards = runtime_shards(folder)
    if not shards:
        raise MissingModel(
            folder,
            expected="a folder with weights in safetensors files",
            found="none",
            fix="Copy them into it; a training run's folder must be exported first (pat-export).",
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise BrokenCheckpoint(
                shard, expected="a whole safetensors file", found=first_line(error), fix="Copy or export it again."
            ) from error
    return shards


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a tokenizer, or with one that is no JSON where it should be.

    Raises:
        BrokenCheckpoint: tokenizer.json is no JSON.
        MissingModel: there is none.
    """
    fix = "Copy the base's tokenizer files into it, or name another after --: --tokenizer FOLDER."
    if not any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise MissingModel(
            folder, expected="a folder with a tokenizer (tokenizer.json or tokenizer.model)", found="none", fix=fix
        )
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BrokenCheckpoint(
                path,
                expected="a tokenizer's JSON",
                found=first_line(error),
                fix="Copy the base's tokenizer files again.",
            ) from error
