"""A small remote cache for a team or a test: Bazel's HTTP protocol over one folder.

GET, HEAD and PUT of `/ac/<sha256>` and `/cas/<sha256>`, also below any prefix. What is put appears by rename, a blob
only if it has the digest that it claims. Beyond `most_bytes` the files that nobody asked for the longest are removed.
With a token every request must carry it as `Authorization: Bearer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import shutil
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlcbuild.graph.digest import BLOCK
from mlcbuild.graph.transport import BYTES, JSON

NAME = re.compile(r"/(?:[^/]+/)*?(ac|cas)/([0-9a-f]{64})")
IDLE_SECONDS = 60.0


class CacheFolder:
    """Files `ac/<sha256>` and `cas/<first two digits>/<sha256>` in `root`, at most `most_bytes` together."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root = root
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        shutil.rmtree(root / "scratch", ignore_errors=True)  # what a killed server has left
        for name in ("ac", "cas", "scratch"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._total = sum(size for _, size, _ in self._list())

    def get_path(self, kind: str, digest: str) -> Path:
        """Where a file lies, if it is there."""
        return self.root / kind / digest if kind == "ac" else self.root / kind / digest[:2] / digest

    def adopt(self, scratch: Path, path: Path) -> None:
        """Move a complete file into place, and remove old ones if there are too many bytes now."""
        path.parent.mkdir(exist_ok=True)
        with self._lock:
            before = os.stat(path).st_size if path.exists() else 0
            self._total += os.stat(scratch).st_size - before
            os.replace(scratch, path)
            if self._total > self.most_bytes:
                self._remove_old(path)

    def _remove_old(self, newest: Path) -> None:
        """Down to nine tenths, so that it is not done for every file."""
        for _, size, path in sorted(self._list()):
            if self._total <= self.most_bytes * 9 // 10:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                self._total -= size

    def _list(self) -> list[tuple[int, int, Path]]:
        """Every file as (time of last use in ns, bytes, path)."""
        paths = [path for kind in ("ac", "cas") for path in (self.root / kind).rglob("*") if path.is_file()]
        return [(stat.st_mtime_ns, stat.st_size, path) for path in paths for stat in (path.stat(),)]


class CacheServer(ThreadingHTTPServer):
    """Serves `folder` at (host, port); port 0 takes a free one, see `url`."""

    daemon_threads = True

    def __init__(self, folder: CacheFolder, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        self.folder = folder
        self.token = token
        super().__init__((host, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is its own business."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """What to give as remote=."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart
    timeout = IDLE_SECONDS
    server: CacheServer

    def do_GET(self) -> None:
        """The file."""
        path = self._find()
        if path is None:
            return
        try:
            with open(path, "rb") as file:
                os.utime(path)
                self._begin(200, os.fstat(file.fileno()).st_size, JSON if path.parent.name == "ac" else BYTES)
                shutil.copyfileobj(file, self.wfile, BLOCK)
        except FileNotFoundError:
            self._answer(404)

    def do_HEAD(self) -> None:
        """Its size."""
        path = self._find()
        if path is not None:
            try:
                self._begin(200, os.stat(path).st_size, BYTES)
            except FileNotFoundError:
                self._answer(404)

    def do_PUT(self) -> None:
        """Keep it. 411 without a length, 413 for more than all may have, 400 for a blob that is not what it claims."""
        path = self._find()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self._answer(411)
        elif int(length) > self.server.folder.most_bytes:
            self._answer(413)
        else:
            self._receive(path, int(length))

    def _receive(self, path: Path, length: int) -> None:
        scratch, digest = self.server.folder.root / "scratch" / uuid.uuid4().hex, hashlib.sha256()
        try:
            with open(scratch, "xb") as file:
                while length and (block := self.rfile.read(min(BLOCK, length))):
                    length -= len(block)
                    digest.update(block)
                    file.write(block)
            if length or (path.parent.name != "ac" and digest.hexdigest() != path.name):
                self._answer(400)
                return
            self.server.folder.adopt(scratch, path)
            self._begin(200, 0, BYTES)
        except OSError as error:
            self.log_error("%s", error)
            with contextlib.suppress(OSError):
                self._answer(507)
        finally:
            scratch.unlink(missing_ok=True)

    def _find(self) -> Path | None:
        """The path that the request names; None when it has been answered with an error."""
        wanted = f"Bearer {self.server.token}"
        given = self.headers.get("Authorization", "")
        if self.server.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            self._answer(401)
            return None
        match = NAME.fullmatch(self.path)
        if match is None:
            self._answer(404)
            return None
        return self.server.folder.get_path(match[1], match[2])

    def _begin(self, status: int, size: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _answer(self, status: int) -> None:
        """No more than the status. A body that was not read would be taken for the next request."""
        if self.command == "PUT":
            self.close_connection = True
        self._begin(status, 0, BYTES)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A cache that works is silent."""


def run_cache_server(folder: Path, host: str, port: int, most_bytes: int, token: str) -> None:
    """Serve until Ctrl-C or SIGTERM. OSError when the folder cannot be written or the port is taken."""
    with CacheServer(CacheFolder(folder, most_bytes), host, port, token) as server:
        print(f"remote cache at {server.url} in {folder}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
