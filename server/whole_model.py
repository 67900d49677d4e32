"""What a local model folder lacks, told before vLLM spends half a minute on finding out, or ends in tracebacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pat_serve.errors import BrokenCheckpoint, MissingModel, first_line
from pat_serve.strict_json import parse

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# With one of them the folder's own tokenizer is not asked for.
_OTHER_TOKENIZER = ("--tokenizer", "--skip-tokenizer-init", "--tokenizer-mode")


def check_whole(model: str, folder: Path, vllm_flags: Sequence[str] = ()) -> None:
    """Refuse a folder whose weights are cut off, or whose tokenizer is missing or no JSON.

    Args:
        model: as the user named it; one from the hub is not looked at, since perhaps not all of it has come.
        folder: where it lies.
        vllm_flags: those of the command line.

    Raises:
        BrokenCheckpoint: a file is damaged.
        MissingModel: there is no tokenizer.
    """
    if not Path(model).is_dir():
        return
    for shard in sorted(folder.glob("*.safetensors")):
        _check_shard(shard)
    if any(flag.partition("=")[0] in _OTHER_TOKENIZER for flag in vllm_flags):
        return
    found = [name for name in _TOKENIZERS if (folder / name).is_file()]
    if not found and not any(folder.glob("*.tiktoken")):
        raise MissingModel(
            model,
            expected="a folder with a tokenizer (tokenizer.json or tokenizer.model)",
            found="none",
            fix="Copy the base's tokenizer files into it, or name another after --: --tokenizer FOLDER.",
        )
    if "tokenizer.json" in found:
        path = folder / "tokenizer.json"
        try:
            parse(path.read_bytes())
        except ValueError as error:
            raise BrokenCheckpoint(
                path,
                expected="a tokenizer's JSON",
                found=first_line(error),
                fix="Copy the base's tokenizer files again.",
            ) from error


def _check_shard(shard: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # Looks at the header and at the file's length; no weight is read.
        with safe_open(shard, framework="np"):
            pass
    except SafetensorError as error:
        raise BrokenCheckpoint(
            shard,
            expected="a whole safetensors file",
            found=f"{shard.stat().st_size} bytes: {first_line(error)}",
            fix="Copy or export it again.",
        ) from error
