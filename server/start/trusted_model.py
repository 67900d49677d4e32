"""A model folder must not make the server run code of its own.

A pickle runs code when it is opened, and `auto_map` names Python files that transformers would import. Pickles and code
are refused before vLLM sees the folder, and vLLM is told to open safetensors only.
"""

from __future__ import annotations

import json
from pathlib import Path

from pat_serve.errors import UnsupportedModel

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def check_trusted(model: str, folder: Path) -> None:
    """Refuse a model whose weights are pickles only, or that brings code.

    Pickles beside safetensors are harmless: nothing opens them.

    Args:
        model: as the user named it.
        folder: the part of the model that is on this disk; for a hub model perhaps its config.json alone.

    Raises:
        UnsupportedModel: the model is such a one.
    """
    safe = any(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles and not safe:
        raise UnsupportedModel(
            model,
            expected="weights in safetensors files",
            found=f"{pickles[0]}, a pickle, which runs code when it is opened",
            fix="Convert it: transformers' save_pretrained writes safetensors.",
        )
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".index.json") or path.name == "tokenizer.json":
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever needs the file will say so
        if isinstance(settings, dict) and settings.get("auto_map"):
            raise UnsupportedModel(
                model,
                expected="an architecture that transformers and vLLM know themselves",
                found=f"auto_map in {path.name}, which names code of the model's own",
                fix="Serve a model without code of its own; pat-export writes such folders.",
            )
