"""GET /: the web page, one route for each file of its folder, so that no path can lead out of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

INDEX = "index.html"
TYPES = {  # by ourselves: what the system says differs from one to the next
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
SAFETY = {
    # Nothing but our own files, no inline script or style: what a model writes cannot run, nor call anybody.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_page_router(folder: Path) -> APIRouter:
    """A route for each file below `folder` whose type is known, and / for its index; none when there is no folder."""
    router = APIRouter(include_in_schema=False)
    for path in sorted(folder.rglob("*")):
        if path.suffix in TYPES and path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            router.add_api_route(f"/{'' if name == INDEX else name}", make_endpoint(path), methods=["GET"])
    return router


def make_endpoint(path: Path) -> Callable[[Request], Awaitable[FileResponse]]:
    """An endpoint that answers with one file."""

    async def get_file(request: Request) -> FileResponse:
        return FileResponse(path, media_type=TYPES[path.suffix], headers=SAFETY)

    return get_file
