"""The web page at `/`: the files in `web/` as they are, and the facts about this server that they need.

The files hold no secret. `--public-page` opens them without a key, because a browser can send none when it opens an
address. The page then asks its user for a key: everything that it shows comes from routes that ask for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel

from pat_serve.checkpoints.locate import locate
from pat_serve.errors import PatServeError

_WEB = Path(__file__).parents[1] / "web"
_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES: Mapping[str, Path] = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(_WEB.iterdir())
    if path.suffix in _TYPES
}
_ACCESS = "/page/access"
# All paths of the page, to the letter.
PAGE_PATHS = frozenset(_FILES) | {_ACCESS}

# The page runs nothing inline, loads nothing from elsewhere and stands in nobody's frame, so text that slipped through
# as markup could still do nothing.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_MAX_CARD_CHARS = 200_000


class PageModel(BaseModel):
    """`GET /page/model`: the served model, and its card as the README.md of its folder has it.

    `has_chat` says whether the model, and its baseline if there is one, have a chat template.
    """

    model: str
    baseline: str | None
    max_model_len: int
    has_chat: bool
    has_speedup: bool
    card: str | None


def page_router() -> APIRouter:
    """The routes of the files; the OpenAPI document leaves them out, because they are for browsers."""
    router = APIRouter(include_in_schema=False)
    for path in _FILES:
        router.add_api_route(path, _file, methods=["GET", "HEAD"])
    router.add_api_route(_ACCESS, _access, methods=["GET"])
    return router


async def _file(request: Request) -> FileResponse:
    path = _FILES[request.url.path]
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=dict(_HEADERS))


async def _access(request: Request) -> JSONResponse:
    keys = request.app.state.pat_serve_gate.policy.keys.keys
    return JSONResponse({"key_needed": bool(keys)}, headers={"Cache-Control": "no-store"})


def read_card(model: str) -> str | None:
    """The model's README.md, cut where it is absurdly long; None where there is none to read."""
    try:
        with (locate(model, weights=False) / "README.md").open(encoding="utf-8", errors="replace") as card:
            return card.read(_MAX_CARD_CHARS)
    except (OSError, PatServeError):
        return None
