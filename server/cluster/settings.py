"""The arguments of a Ray Serve application, under `args:` of serve_config.yaml or as KEY=VALUE after `serve run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pat_serve.checkpoints.locate import absolute, locate
from pat_serve.errors import UsageError
from pat_serve.server.start.trusted_model import check_trusted

# These flags are set by the application.
_TAKEN = ("--model", "--host", "--port")
# Ray keeps the arguments and shows them. vLLM's parser takes this flag behind -- too, with _ for - and cut short.
_SECRET = "--api-key"


class ReplicaSettings(BaseModel):
    """Arguments of the application.

    Attributes:
        model: model folder or GGUF file, at the same path on every node, or hub id.
        flags: further flags of pat-serve as one string; those for vLLM after `--`.
        start_timeout_s: time until a replica's server must be ready; loading a large model takes minutes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    flags: str = ""
    # `serve run` hands all values on as text.
    start_timeout_s: float = Field(default=1800.0, gt=0)


def read_settings(arguments: Mapping[str, Any]) -> ReplicaSettings:
    """Check the arguments before any replica starts.

    Returns:
        the settings; a local path is absolute, since replicas run elsewhere.

    Raises:
        UsageError: an argument is missing, unknown, or not the application's to take.
        MissingModel: no such folder, or no such model on the hub.
        UnsupportedModel: it brings pickles or code.
    """
    try:
        settings = ReplicaSettings.model_validate(dict(arguments))
        flags = shlex.split(settings.flags)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"argument {first['loc'][0]}",
            expected=f"arguments out of {', '.join(ReplicaSettings.model_fields)}",
            found=first["msg"][0].lower() + first["msg"][1:],
            fix="Mend it under args: of the application, or after `serve run`, as in docs/deployment.md.",
        ) from error
    except ValueError as error:
        raise UsageError(
            "argument flags", expected="a command line", found=str(error).lower(), fix="Close the quote."
        ) from error
    own = len(flags[: flags.index("--")] if "--" in flags else flags)
    for place, flag in enumerate(flags):
        name = flag.split("=")[0].replace("_", "-")
        secret = name.startswith("--api-k") and _SECRET.startswith(name)
        if secret or (place < own and name in _TAKEN):
            raise UsageError(
                f"argument flags: {name}",
                expected="flags that are not the application's own",
                found=name,
                fix="Give the model as model:, keys as --api-key-file FILE; address and port are Ray Serve's "
                "(http_options).",
            )
    folder = locate(settings.model, weights=False)
    check_trusted(settings.model, folder)
    return settings.model_copy(update={"model": absolute(settings.model)})


def server_command(settings: ReplicaSettings, *, port: int, parent: int) -> list[str]:
    """The command that starts a replica's server.

    Args:
        settings: the application's.
        port: port of 127.0.0.1 to listen on.
        parent: process id of the replica; the server ends with it.
    """
    command = [sys.executable, "-m", "pat_serve.server.cluster.child", str(parent)]
    command += [str(Path(sys.executable).with_name("pat-serve")), "--model", settings.model, "--port", str(port)]
    return command + shlex.split(settings.flags)
