"""The provenance of a model, from the pat_export.json that pat-export has put beside its weights."""

from __future__ import annotations

import logging
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from pat_serve.checkpoints.locate import locate
from pat_serve.errors import PatServeError, first_line
from pat_serve.version import __version__

logger = logging.getLogger(__name__)

_Name = Annotated[str, Field(max_length=256)]


class _Base(BaseModel):
    source: _Name


class _Widths(BaseModel):
    base: int
    exported: int


class _Record(BaseModel):
    """The part of the record that is shown."""

    method: _Name
    base: _Base
    hidden_size: _Widths


def model_labels(source: str, name: str, hidden_size: int) -> dict[str, str]:
    """The served model as labels of a metric. A model that pat-export has not written has no base and no method.

    Args:
        source: folder or hub id.
        name: name under which the model is served.
        hidden_size: width of the residual stream, as the engine has it.
    """
    record = _read(source)
    return {
        "model": name,
        "base": record.base.source if record else "",
        "hidden_size": str(hidden_size),
        "base_hidden_size": str(record.hidden_size.base) if record else "",
        "method": record.method if record else "",
        "version": __version__,
    }


def _read(source: str) -> _Record | None:
    try:
        path = locate(source, weights=False) / "pat_export.json"
        return _Record.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, PatServeError, ValidationError) as error:
        # The record is only shown, so a model is served without it.
        told = "%s: pat_export.json cannot be read (%s); the metrics will not name the model's base"
        logger.warning(told, source, first_line(error))
        return None
