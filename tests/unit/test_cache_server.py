"""The cache server: what it keeps, what it refuses, what it forgets."""

from __future__ import annotations

import hashlib
import os
import shutil
from http.client import HTTPConnection
from pathlib import Path

from mlcbuild.graph.cache_server import CacheFolder, CacheServer


def ask(server: CacheServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, body=body or None, headers=headers)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_the_server_keeps_only_what_is_right(server: CacheServer) -> None:
    digest = hashlib.sha256(b"data").hexdigest()
    assert ask(server, "PUT", f"/cas/{digest}", b"Data")[0] == 400
    assert ask(server, "GET", f"/cas/{digest}")[0] == 404
    assert ask(server, "PUT", f"/prefix/cas/{digest}", b"data")[0] == 200
    assert ask(server, "GET", f"/cas/{digest}") == (200, b"data")
    assert ask(server, "HEAD", f"/cas/{digest}") == (200, b"")
    for path in ("/", "/cas/..%2f..%2fetc", f"/cas/{digest}/x", f"/cas/{digest.upper()}", "/cas/../ac/x"):
        assert ask(server, "GET", path)[0] == 404
        assert ask(server, "PUT", path, b"data")[0] == 404
    assert ask(server, "PUT", f"/cas/{digest}", b"", **{"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(server, "PUT", f"/cas/{digest}", b"", **{"Content-Length": str(1 << 40)})[0] == 413
    assert ask(server, "DELETE", f"/cas/{digest}")[0] == 501


def test_the_server_forgets_what_nobody_wants(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "server", 3500)
    digests = [f"{index:064x}" for index in range(5)]

    def put(index: int) -> None:
        (folder.root / "scratch" / "new").write_bytes(bytes(1000))
        folder.adopt(folder.root / "scratch" / "new", folder.get_path("cas", digests[index]))
        os.utime(folder.get_path("cas", digests[index]), (index, index))

    for index in range(3):
        put(index)
    os.utime(folder.get_path("cas", digests[0]), (100, 100))  # wanted again
    put(3)
    left = [folder.get_path("cas", digest).exists() for digest in digests]
    assert left == [True, False, True, True, False]
    shutil.copy(folder.get_path("cas", digests[0]), folder.root / "scratch" / "half")
    again = CacheFolder(tmp_path / "server", 3500)
    assert again._total == 3000
    assert list((folder.root / "scratch").iterdir()) == []
