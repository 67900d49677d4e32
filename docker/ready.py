"""The images' health check: exit 0 when `/ready` says that the engine answers. The port is the server's own."""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path


def port() -> str:
    """Read the port from the server's command line; the server is process 1."""
    arguments = Path("/proc/1/cmdline").read_bytes().decode().split("\0")
    given = [arguments[at + 1] for at, word in enumerate(arguments[:-1]) if word == "--port"]
    given += [word.removeprefix("--port=") for word in arguments if word.startswith("--port=")]
    return given[-1] if given else os.environ.get("PORT", "8000")


# A container may have http_proxy in its environment. The check does not ask its own server through that proxy.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with direct.open(f"http://127.0.0.1:{port()}/ready", timeout=8):
        pass
except OSError as error:
    sys.exit(f"not ready: {error}")
