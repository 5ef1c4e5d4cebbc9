"""Stores that share one action through a remote cache: for its tests."""

from __future__ import annotations

from pathlib import Path

from mlcbuild.graph.action import SCHEMA, make_key
from mlcbuild.graph.digest import DigestMemo
from mlcbuild.graph.remote import Remote
from mlcbuild.graph.settings import ignore_report
from mlcbuild.graph.store import Blob, Record, Store, make_blobs
from mlcbuild.graph.transport import hide_secrets, make_transport

BIG = bytes(range(256)) * 12_000  # 3 MB: several blocks
SPECIFICATION = {"schema": SCHEMA, "step": "convert", "params": {"bits": 4}, "outputs": ["note", "weights"]}
KEY = make_key(SPECIFICATION)


def make_store(folder: Path) -> Store:
    return Store(folder, DigestMemo(folder / "memo"))


def keep(store: Store, folder: Path, big: bytes = BIG) -> Record:
    """Put an action's outputs into the store: a folder with a big and an empty file, and a file."""
    (folder / "weights" / "sub").mkdir(parents=True)
    (folder / "weights" / "big.bin").write_bytes(big)
    (folder / "weights" / "sub" / "empty").write_bytes(b"")
    (folder / "note.txt").write_text("done\n")
    made = {"weights": folder / "weights", "note": folder / "note.txt"}
    memo = DigestMemo(folder / "memo")
    record = Record(KEY, SPECIFICATION, {name: make_blobs(name, path, memo) for name, path in made.items()}, 1.5)
    store.save(record, made)
    return record


def connect(url: str, *, readonly: bool = False, **environment: str) -> Remote:
    """A remote that gives up soon."""
    environment = {"MLCBUILD_REMOTE_TIMEOUT": "0.5", **environment}
    return Remote(make_transport(url, environment), hide_secrets(url), readonly=readonly)


def push(url: str, folder: Path, **environment: str) -> Record:
    """Build in a first store and push."""
    store = make_store(folder / "first")
    record = keep(store, folder / "made")
    connect(url, **environment).push(record, store, ignore_report)
    return record


def restore(store: Store, record: Record, folder: Path) -> bytes:
    folder.mkdir()
    assert store.restore(record, {"weights": folder / "weights", "note": folder / "note.txt"})
    assert (folder / "weights" / "sub" / "empty").read_bytes() == b""
    assert (folder / "note.txt").read_text() == "done\n"
    return (folder / "weights" / "big.bin").read_bytes()


def get_big(record: Record) -> Blob:
    return next(blob for blob in record.outputs["weights"] if blob.path == "big.bin")


def is_clean(store: Store) -> bool:
    """Whether a failed transfer has left neither scratch files nor a record."""
    return list((store.root / "scratch").iterdir()) == list((store.root / "ac").iterdir()) == []
