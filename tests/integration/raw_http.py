"""HTTP by hand, for requests that no client library would send."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

from tests.integration.conftest import HANG_S, KEY, Server

HOST = "127.0.0.1"
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n"
JSON = "Content-Type: application/json\r\n"


class RawClient:
    """A connection on which anything can be sent."""

    def __init__(self, server: Server, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(HANG_S)
        self.socket.connect((HOST, int(server.url.rsplit(":", 1)[1])))

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: str | bytes) -> bool:
        """Send; False if the server has closed the connection on the way."""
        try:
            for part in parts:
                self.socket.sendall(part.encode("latin-1") if isinstance(part, str) else part)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Send a whole request and do not wait for its answer."""
        content = json.dumps(body)
        self.send(
            f"POST {path} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}{JSON}Content-Length: {len(content)}\r\n\r\n", content
        )

    def answer(self) -> tuple[int, str]:
        """Status and text of all that comes until the server closes; (0, "") if it closed without a word."""
        received = b""
        with suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                received += data
        text = received.decode("latin-1")
        return (int(text.split(" ", 2)[1]), text) if text else (0, "")
