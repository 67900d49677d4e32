"""The config.json of a model without its weights: of a folder, a GGUF file's header, a JSON file, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pat_serve.checkpoints.locate import gguf_file, locate, read_config, read_object
from pat_serve.machine.extras import require


def config_of_model(source: str, revision: str | None = None) -> dict[str, Any]:
    """Read what a model says of its sizes; nothing but that is read or fetched.

    Args:
        source: a folder, a GGUF file, a JSON file or a hub id; what is on disk wins.
        revision: of the hub repository.

    Raises:
        MissingModel: none exists, or the hub cannot be reached and the file is not in its cache.
        ModelError: it is damaged or not covered.
        MissingExtra: a GGUF file, and the gguf package is not there.
    """
    path = Path(source)
    if source and (file := gguf_file(path)) is not None:
        require("gguf", "gguf", wanted_by=str(file))
        from pat_serve.gguf.config import ROPE_FREQUENCIES, config_of
        from pat_serve.gguf.header import read_header
        from pat_serve.gguf.weights import read_rows

        header = read_header(file)
        return config_of(header, lambda: read_rows(header, header.tensors[ROPE_FREQUENCIES]))
    if path.is_file() and path.suffix == ".json":
        return read_object(path)
    return read_config(locate(source, revision, weights=False))
