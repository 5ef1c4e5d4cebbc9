"""The remote cache: two stores that share through it, over HTTP, a folder and fsspec. The server is real."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from small_remote import BIG, KEY, connect, get_big, keep, make_store, push, restore

from mlcbuild.errors import StoreError
from mlcbuild.graph.cache_server import CacheServer, Handler
from mlcbuild.graph.remote import RECORD, Remote, get_remote
from mlcbuild.graph.settings import ignore_report, settings
from mlcbuild.graph.transport import make_transport


def test_a_second_store_takes_over_what_the_first_has_built(
    server: CacheServer, tmp_path: Path, warnings: list[str]
) -> None:
    record = push(server.url, tmp_path)
    second = make_store(tmp_path / "second")
    assert connect(server.url).fetch(KEY, second, ignore_report) == record
    assert restore(second, record, tmp_path / "out") == BIG
    assert second.load_record(KEY) == record
    assert connect(server.url).fetch("0" * 64, second, ignore_report) is None
    assert warnings == []


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_folders_and_fsspec_hold_the_same(scheme: str, tmp_path: Path, warnings: list[str]) -> None:
    url = f"file://{tmp_path}/remote" if scheme == "file" else f"memory://{tmp_path.name}/remote"
    assert connect(url).fetch(KEY, make_store(tmp_path / "early"), ignore_report) is None
    record = push(url, tmp_path)
    second = make_store(tmp_path / "second")
    assert connect(url).fetch(KEY, second, ignore_report) == record
    assert restore(second, record, tmp_path / "out") == BIG
    assert warnings == []
    assert [path.name for path in tmp_path.rglob(".*")] == []  # no scratch file


def test_what_is_sent_is_bazels(server: CacheServer, tmp_path: Path) -> None:
    """bazel-remote checks an ActionResult: relative paths that are not empty, digests, sizes as protobuf's JSON."""
    record = push(server.url, tmp_path)
    result = json.loads((tmp_path / "server" / "ac" / KEY).read_bytes())
    big = get_big(record)
    files = {file["path"]: file["digest"] for file in result["outputFiles"]}
    assert sorted(files) == [RECORD, "note", "weights/big.bin", "weights/sub/empty"]
    assert files["weights/big.bin"] == {"hash": big.sha256, "sizeBytes": str(len(BIG))}
    for digest in files.values():
        blob = tmp_path / "server" / "cas" / digest["hash"][:2] / digest["hash"]
        assert blob.stat().st_size == int(digest["sizeBytes"])
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest["hash"]


def test_blobs_that_are_there_do_not_travel_again(
    server: CacheServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, asked = push(server.url, tmp_path), []
    monkeypatch.setattr(Handler, "log_request", lambda self, *_: asked.append((self.command, self.path[:5])))
    store = make_store(tmp_path / "first")
    connect(server.url).push(record, store, ignore_report)
    assert asked == [("HEAD", "/cas/")] * 3 + [("PUT", "/cas/"), ("PUT", "/ac/" + KEY[0])]
    asked.clear()
    (store.root / "ac" / f"{KEY}.json").unlink()
    connect(server.url).fetch(KEY, store, ignore_report)
    assert asked == [("GET", "/ac/" + KEY[0]), ("GET", "/cas/")]


def test_read_only_writes_nothing(server: CacheServer, tmp_path: Path, warnings: list[str]) -> None:
    store = make_store(tmp_path / "first")
    connect(server.url, readonly=True).push(keep(store, tmp_path / "made"), store, ignore_report)
    assert [path for path in (tmp_path / "server").rglob("*") if path.is_file()] == []
    assert warnings == []


def test_who_we_are_comes_from_the_environment(server: CacheServer, tmp_path: Path, warnings: list[str]) -> None:
    server.token = "secret"
    record = push(server.url, tmp_path, MLCBUILD_REMOTE_TOKEN="secret")
    assert (
        connect(server.url, MLCBUILD_REMOTE_TOKEN="secret").fetch(KEY, make_store(tmp_path / "a"), ignore_report)
        == record
    )
    assert warnings == []
    assert connect(server.url).fetch(KEY, make_store(tmp_path / "b"), ignore_report) is None
    assert "401 Unauthorized" in warnings[0]


@pytest.mark.parametrize("by", ["url", "environment"])
def test_basic_authentication(
    server: CacheServer, tmp_path: Path, warnings: list[str], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, find = [], Handler._find

    def look(self: Handler) -> Path | None:
        seen.append(self.headers["Authorization"])
        return find(self)

    monkeypatch.setattr(Handler, "_find", look)
    url = server.url.replace("//", "//ann:p%40ss@") if by == "url" else server.url
    environment = {} if by == "url" else {"MLCBUILD_REMOTE_USER": "ann", "MLCBUILD_REMOTE_PASSWORD": "p@ss"}
    push(url, tmp_path, **environment)
    assert set(seen) == {f"Basic {base64.b64encode(b'ann:p@ss').decode()}"}
    monkeypatch.setattr(Handler, "_find", lambda self: self._answer(401))
    connect(url, **environment).fetch(KEY, make_store(tmp_path / "b"), ignore_report)
    assert "p@ss" not in warnings[0]
    assert "p%40ss" not in warnings[0]


@pytest.mark.parametrize("url", ["cache", "http:/cache", "http://", "file://relative/x", "/folder"])
def test_a_remote_must_be_a_url(url: str) -> None:
    with pytest.raises(StoreError, match="is not the URL of a cache"):
        make_transport(url, {})


@pytest.mark.parametrize(("url", "hint"), [("s3://b/x", "pip install s3fs"), ("gs://b/x", "pip install gcsfs")])
def test_object_stores_need_their_package(url: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str) -> None:
        raise ImportError

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(StoreError) as caught:
        make_transport(url, {})
    assert caught.value.hint == hint


def test_settings_choose_the_remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def look(**values: object) -> Remote | None:
        get_remote.cache_clear()
        for name, value in values.items():
            monkeypatch.setattr(settings, name, value)
        return get_remote()

    monkeypatch.delenv("MLCBUILD_REMOTE", raising=False)
    assert look() is None
    monkeypatch.setenv("MLCBUILD_REMOTE", f"file://{tmp_path}/one")
    assert look()._label == f"file://{tmp_path}/one"
    assert look(remote="http://user:pass@host")._label == "http://host"
    assert look().readonly is False
    monkeypatch.setenv("MLCBUILD_REMOTE_READONLY", "1")
    assert look().readonly is True
    monkeypatch.setenv("MLCBUILD_REMOTE_READONLY", "maybe")
    with pytest.raises(StoreError, match="neither 1 nor 0"):
        look()
    assert look(offline=True) is None
    get_remote.cache_clear()
