"""Find a model, in a folder, in a GGUF file or on the hub, and read its config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pat_serve.errors import BrokenCheckpoint, MissingModel, UnsupportedModel, first_line
from pat_serve.files.strict_json import parse

# These files are enough to train, export and serve a model: no pickles, no code, no other frameworks' weights.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# A hub id is "owner/name" or "name". Any other text must be a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GGUF_SUFFIX = ".gguf"


def locate(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Find the folder of a model: a local one, the one that a GGUF file is read to, or a snapshot of a hub repository.

    Args:
        source: a folder, a GGUF file or a hub id; a path on the disk wins.
        revision: of the hub repository.
        weights: fetch everything from the hub; if False, config.json alone.

    Raises:
        MissingModel: none exists, or the hub cannot be reached and the model is not in its cache.
        ModelError: a GGUF file that is damaged or not covered.
    """
    path = Path(source)
    if source and (file := gguf_file(path)) is not None:
        from pat_serve.gguf.folder import folder_of

        return folder_of(file)
    # Path("") is the current folder, which an empty variable in a script does not mean.
    if source and path.is_dir():
        _check_links(path)
        if not (path / "config.json").is_file():
            raise MissingModel(
                source,
                expected="a model folder with a config.json",
                found="a folder without one",
                fix="Give the folder that holds config.json; a training run's must be exported first (pat-export).",
            )
        return path
    if path.is_file() or is_gguf_name(path) or not _HUB_ID.fullmatch(source):
        raise MissingModel(
            source or "(empty)",
            expected="a model folder, a .gguf file or a hub id (owner/name)",
            found="another file" if path.is_file() else f"no such {'file' if is_gguf_name(path) else 'folder'}",
            fix="Check the path.",
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not weights:
            return Path(hf_hub_download(source, "config.json", revision=revision)).parent
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS))
    # The hub client raises a dozen unrelated types (HTTP, cache, validation); all mean the same to the user.
    except Exception as error:
        raise MissingModel(
            source,
            expected="a model folder, or a hub id that can be downloaded or is cached",
            found=f"no such folder, and the hub said {type(error).__name__}: {first_line(error)}",
            fix="Check the name, the network and HF_TOKEN, or give a local folder or .gguf file.",
        ) from error


def stock_path(source: str) -> str:
    """Give the path for loaders that know nothing of GGUF: a GGUF file's folder, or any other model as it was named.

    Raises:
        ModelError: as `locate`.
    """
    return str(locate(source)) if source and gguf_file(Path(source)) is not None else source


def gguf_file(path: Path) -> Path | None:
    """Find the GGUF file that a path means: the path itself, or the only one in a folder that holds no other model.

    Raises:
        MissingModel: the folder holds several GGUF files.
    """
    if path.is_file():
        return path if is_gguf_name(path) else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(file for file in path.iterdir() if is_gguf_name(file) and file.is_file())
    if len(files) > 1:
        raise MissingModel(
            path,
            expected="one model",
            found=f"{len(files)} GGUF files: {', '.join(file.name for file in files[:4])}",
            fix=f"Name one of them: {files[0]}.",
        )
    return files[0] if files else None


def is_gguf_name(path: Path) -> bool:
    """Tell whether a name is that of a GGUF file."""
    return path.suffix.lower() == _GGUF_SUFFIX


def absolute(source: str) -> str:
    """Make a local path absolute; leave a hub id as it is.

    A link is not followed: in the hub's cache it has the name that its target lacks.
    """
    path = Path(source)
    if not path.exists():
        return source
    return str(path.parent.resolve() / path.name if path.is_file() else path.resolve())


def commit_of(folder: Path) -> str | None:
    """The commit of a hub snapshot, which its folder in the hub's cache is named after; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        BrokenCheckpoint: the file is not a JSON object.
    """
    return read_object(folder / "config.json")


def check_plain_folder(folder: Path) -> None:
    """Check that a folder holds data alone: no code, no call for code, and no file that lies elsewhere.

    Nothing here ever runs a model's own code. But a model that comes with code may be another function than the stock
    class of its name computes, and then every result of this package would be wrong.

    Raises:
        UnsupportedModel: the folder has Python files, a file that asks for some (`auto_map`), or an adapter.
        BrokenCheckpoint: a file is a link that leads out of the folder.
    """
    entries = sorted(folder.iterdir())
    code = [path.name for path in entries if path.suffix in (".py", ".pyc", ".so")]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file() and "auto_map" in read_object(folder / name):
            code.append(f"auto_map in {name}")
    if code:
        raise UnsupportedModel(
            folder,
            expected="a model that a stock class computes",
            found=f"code of its own ({code[0]})",
            fix="If the stock class computes the same, delete the .py files and the auto_map, and try again.",
        )
    check_no_adapter(folder)
    check_inside(folder, (path for path in entries if any(path.match(pattern) for pattern in HUB_PATTERNS)))


def check_no_adapter(folder: Path) -> None:
    """Check that no adapter lies beside the model: transformers would add it to the weights, and vLLM would not.

    Raises:
        UnsupportedModel: the folder holds an adapter.
    """
    name = "adapter_config.json"
    if (folder / name).is_file():
        raise UnsupportedModel(
            folder,
            expected="a whole model alone",
            found=f"an adapter beside it ({name}), which transformers adds to the weights and vLLM does not",
            fix="Move the adapter's files away, or merge it (peft's merge_and_unload) and save the model again.",
        )


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Check that no link leads out of the folder. Links of a hub snapshot may lead to the blobs of its own repository.

    Raises:
        BrokenCheckpoint: a link leads out.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in files:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise BrokenCheckpoint(
                path,
                expected="a file in the model's own folder",
                found=f"a link to {target}",
                fix="Copy the file to its place, if it is the model's.",
            )


def _check_links(folder: Path) -> None:
    """Check that no link is dead. A hub snapshot consists of links, and is often copied without their targets.

    Raises:
        BrokenCheckpoint: a link is dead.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and any(path.match(pattern) for pattern in HUB_PATTERNS):
            raise BrokenCheckpoint(
                path,
                expected="a file",
                found=f"a link to {path.readlink()}, where nothing is",
                fix="Copy the model with what its links lead to (cp -rL), or give its hub id.",
            )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        BrokenCheckpoint: it cannot be read, or holds something else.
    """
    fix = "Copy or download the model again."
    try:
        document = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(path, expected="a JSON object", found=first_line(error), fix=fix) from error
    if not isinstance(document, dict):
        raise BrokenCheckpoint(path, expected="a JSON object", found=type(document).__name__, fix=fix)
    return document
