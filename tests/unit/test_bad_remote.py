"""All that a remote cache can do wrong: a build goes on, and believes nothing that it cannot check."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from small_remote import BIG, KEY, SPECIFICATION, connect, get_big, is_clean, keep, make_store, push

from mlcbuild.graph import remote as remote_module
from mlcbuild.graph.action import SCHEMA, make_canonical_json, make_key
from mlcbuild.graph.cache_server import CacheServer, Handler
from mlcbuild.graph.remote import RECORD, check_record, make_action_result
from mlcbuild.graph.settings import ignore_report
from mlcbuild.graph.store import Blob, Record
from mlcbuild.graph.transport import RemoteError


def test_the_first_user_of_a_missing_blob_builds(server: CacheServer, tmp_path: Path, warnings: list[str]) -> None:
    """A cache may have dropped some of it: that is a miss, and no fault."""
    big = get_big(push(server.url, tmp_path))
    server.folder.get_path("cas", big.sha256).unlink()
    second = make_store(tmp_path / "second")
    assert connect(server.url).fetch(KEY, second, ignore_report) is None
    assert is_clean(second)
    assert warnings == []


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged; it is made anew"),
        (lambda data: data[:1000], "is damaged; it is made anew"),
        (lambda data: data + b"x", f"has more than {len(BIG)} bytes; going on without it"),
    ],
)
def test_a_damaged_blob_is_not_believed(
    server: CacheServer, tmp_path: Path, warnings: list[str], harm: Callable[[bytes], bytes], text: str
) -> None:
    big = get_big(push(server.url, tmp_path))
    path = server.folder.get_path("cas", big.sha256)
    path.write_bytes(harm(path.read_bytes()))
    second, remote = make_store(tmp_path / "second"), connect(server.url)
    assert remote.fetch(KEY, second, ignore_report) is None
    assert is_clean(second)
    assert not second.has_blob(big)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"remote cache {server.url}: cas/")
    assert warnings[0].endswith(text)
    assert remote.fetch(KEY, second, ignore_report) is None
    assert len(warnings) == 1


class Truncating(Handler):
    """Hangs up in the middle of a big answer."""

    def do_GET(self) -> None:
        if self.path.startswith("/ac/"):
            return super().do_GET()
        self._begin(200, len(BIG), "application/octet-stream")
        self.wfile.write(BIG[:100_000])
        self.close_connection = True
        return None


class Failing(Handler):
    """500 for everything."""

    def _find(self) -> None:
        self._answer(500)


class Hanging(Handler):
    """Takes every request and never answers."""

    def _find(self) -> None:
        time.sleep(3)
        self.close_connection = True


class Dripping(Handler):
    """A byte now and then, each in time."""

    def do_GET(self) -> None:
        self._begin(200, 1000, "application/octet-stream")
        for _ in range(100):
            self.wfile.write(b"{")
            self.wfile.flush()
            time.sleep(0.1)


class Endless(Handler):
    """An answer without an end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b" " * (1 << 20))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Truncating, "ends after 100000 of 3072000 bytes"),
        (Failing, "500 Internal Server Error"),
        (Hanging, "it does not answer in time"),
        (Dripping, "ends after"),
        (Endless, "has more than"),
    ],
)
def test_a_bad_server_costs_a_warning_and_little_time(
    server: CacheServer,
    tmp_path: Path,
    warnings: list[str],
    kind: type[Handler],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_module, "MOST_BYTES", 4 << 20)
    monkeypatch.setattr("mlcbuild.graph.transport.SLOWEST", 64 << 20)
    record = push(server.url, tmp_path)
    server.RequestHandlerClass = kind
    second, remote, started = make_store(tmp_path / "second"), connect(server.url), time.perf_counter()
    assert remote.fetch(KEY, second, ignore_report) is None
    assert time.perf_counter() - started < 5
    remote.push(record, second, ignore_report)  # it is not asked again, and so cannot fail either
    assert is_clean(second)
    assert len(warnings) == 1
    assert text in warnings[0]


def test_a_server_that_recovers_is_forgiven(
    server: CacheServer, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(server.url, tmp_path)
    find, calls = Handler._find, []

    def fail_first(self: Handler) -> Path | None:
        calls.append(self.path)
        if calls.count(self.path) == 1:
            self._answer(503)
            return None
        return find(self)

    monkeypatch.setattr(Handler, "_find", fail_first)
    assert connect(server.url).fetch(KEY, make_store(tmp_path / "second"), ignore_report) is not None
    assert warnings == []


@pytest.mark.parametrize("how", ["push", "fetch"])
def test_a_dead_server(tmp_path: Path, warnings: list[str], how: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    store, remote = make_store(tmp_path / "store"), connect(url)
    record = keep(store, tmp_path / "made")
    for _ in range(2):
        if how == "push":
            remote.push(record, store, ignore_report)
        else:
            assert remote.fetch(KEY, store, ignore_report) is None
    assert len(warnings) == 1
    assert "Connection refused; going on without it" in warnings[0]


WORKERS = """
import os
from mlcbuild.graph.remote import get_remote
remote = get_remote()
for _ in range(2):
    if os.fork() == 0:
        remote.fetch("0" * 64, None, None)
        os._exit(0)
    os.wait()
remote.fetch("0" * 64, None, None)
"""


def test_a_warning_is_said_once_by_all_workers() -> None:
    """In a process of its own, since forking one with threads is not done."""
    environment = {**os.environ, "MLCBUILD_REMOTE": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", WORKERS], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "warn  remote cache http://127.0.0.1:1: GET ac/000000000: [Errno 111] Connection refused; going on without it"
    ]


def test_a_server_that_lets_us_read_only_is_read_on(
    server: CacheServer, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = push(server.url, tmp_path)
    monkeypatch.setattr(
        Handler, "do_PUT", lambda self: (self.rfile.read(int(self.headers["Content-Length"])), self._answer(403))
    )
    remote, store = connect(server.url), make_store(tmp_path / "first")
    remote.push(record, store, ignore_report)
    remote.push(record, store, ignore_report)
    assert len(warnings) == 1
    assert warnings[0].endswith("403 Forbidden; nothing more is written to it")
    assert remote.fetch(KEY, make_store(tmp_path / "second"), ignore_report) == record


def make_bytes(record: Record) -> bytes:
    return make_canonical_json({"schema": SCHEMA, **asdict(record)}).encode()


@pytest.mark.parametrize(
    "blobs",
    [
        [("../../../etc/cron.d/x", 1)],
        [("/etc/passwd", 1)],
        [("a/../../b", 1)],
        [("a//b", 1)],
        [("a", 1), ("a", 1)],
        [("a", 1), ("a/b", 1)],
        [("", 1), ("a", 1)],
        [("a\0b", 1)],
        [("x" * 300, 1)],
        [("a", -1)],
        [("a", True)],
        [("a", "1")],
        [(7, 1)],
        [],
    ],
)
def test_a_record_cannot_do_harm(blobs: list[tuple[str, int]]) -> None:
    note = (Blob("", 5, "ab" * 32),)
    weights = tuple(Blob(path, size, "cd" * 32) for path, size in blobs)
    good = Record(KEY, SPECIFICATION, {"note": note, "weights": (Blob("a/b", 1, "cd" * 32),)}, 1.0)
    assert check_record(make_bytes(good), KEY) == good
    with pytest.raises(RemoteError, match="makes no sense"):
        check_record(make_bytes(replace(good, outputs={"note": note, "weights": weights})), KEY)


def test_a_record_must_be_what_was_asked_for(server: CacheServer, tmp_path: Path, warnings: list[str]) -> None:
    """Another action's record under this key, and one whose specification is not the key's."""
    record = push(server.url, tmp_path)
    other = {**SPECIFICATION, "params": {"bits": 8}}
    with pytest.raises(RemoteError):
        check_record(make_bytes(record), make_key(other))
    with pytest.raises(RemoteError):
        check_record(make_bytes(replace(record, specification=other)), KEY)
    for data in (b"", b"[]", b"{}", b'{"schema": 1}', b"[" * 100_000, b"\xff"):
        with pytest.raises(RemoteError):
            check_record(data, KEY)
    for result in (b"", b"[]", b"nonsense", b'{"outputFiles": [{}]}'):
        (tmp_path / "server" / "ac" / KEY).write_bytes(result)
        assert connect(server.url).fetch(KEY, make_store(tmp_path / "second"), ignore_report) is None
        assert "makes no sense" in warnings.pop()
    somebody_else = make_action_result(replace(record, outputs={}), Blob("other.txt", 0, "ab" * 32))
    (tmp_path / "server" / "ac" / KEY).write_bytes(somebody_else.replace(RECORD.encode(), b"other"))
    assert connect(server.url).fetch(KEY, make_store(tmp_path / "second"), ignore_report) is None
    assert warnings == []


def test_a_full_disk_is_ours_not_the_remotes(
    server: CacheServer, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = push(server.url, tmp_path)
    second = make_store(tmp_path / "second")
    monkeypatch.setattr(hashlib, "sha256", lambda *data: FullDisk(hashlib.new("sha256", *data)))
    with pytest.raises(OSError, match="No space left"):
        connect(server.url).fetch(KEY, second, ignore_report)
    assert is_clean(second)
    assert warnings == []
    assert get_big(record).size == len(BIG)


class FullDisk:
    """A digest that fails as a disk does, at the first block of a download."""

    def __init__(self, digest: hashlib._Hash) -> None:
        self.hexdigest = digest.hexdigest

    def update(self, block: bytes) -> None:
        raise OSError(28, "No space left on device")
