"""The content store: what goes in comes out, and what is damaged is noticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mlcbuild.errors import StepError, StoreError
from mlcbuild.graph.digest import DigestMemo
from mlcbuild.graph.store import SMALL, Record, Store, make_blobs

KEY = "ab" * 32
BIG = b"w" * (SMALL + 1)


@pytest.fixture
def memo(tmp_path: Path) -> DigestMemo:
    return DigestMemo(tmp_path / "memo")


@pytest.fixture
def store(tmp_path: Path, memo: DigestMemo) -> Store:
    return Store(tmp_path / "store", memo)


def keep(store: Store, memo: DigestMemo, folder: Path) -> Record:
    """Put a folder output and a file output into the store."""
    (folder / "weights" / "sub").mkdir(parents=True)
    (folder / "weights" / "big.bin").write_bytes(BIG)
    (folder / "weights" / "sub" / "index.json").write_text("{}")
    (folder / "log.txt").write_text("done\n")
    made = {"weights": folder / "weights", "log": folder / "log.txt"}
    outputs = {name: make_blobs(name, path, memo) for name, path in made.items()}
    record = Record(KEY, {"step": "convert", "params": {"bits": 4}}, outputs, 1.5)
    store.save(record, made)
    return record


def restore(store: Store, record: Record, folder: Path) -> bool:
    return store.restore(record, {"weights": folder / "weights", "log": folder / "log.txt"})


def get_blob(store: Store, record: Record, path: str) -> Path:
    digest = next(blob.sha256 for blobs in record.outputs.values() for blob in blobs if blob.path == path)
    return store.root / "cas" / digest[:2] / digest


def test_round_trip(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    shutil.rmtree(tmp_path / "made")
    found = store.load_record(KEY)
    assert found == record
    assert restore(store, record, tmp_path / "out")
    assert (tmp_path / "out" / "weights" / "big.bin").read_bytes() == BIG
    assert (tmp_path / "out" / "weights" / "sub" / "index.json").read_text() == "{}"
    assert (tmp_path / "out" / "log.txt").read_text() == "done\n"
    assert list((store.root / "scratch").iterdir()) == []


def test_a_fresh_memo_finds_it_too(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    other = Store(store.root, DigestMemo(tmp_path / "other memo"))
    assert restore(other, record, tmp_path / "out")


def test_large_files_share_their_bytes_and_are_read_only(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    assert restore(store, record, tmp_path / "out")
    blob, big = get_blob(store, record, "big.bin"), tmp_path / "out" / "weights" / "big.bin"
    assert os.path.samefile(blob, big)
    assert big.stat().st_mode & 0o777 == 0o444
    assert not os.path.samefile(get_blob(store, record, ""), tmp_path / "out" / "log.txt")


def test_equal_contents_are_kept_once(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    keep(store, memo, tmp_path / "again")
    blobs = [path for path in (store.root / "cas").rglob("*") if path.is_file()]
    assert len(blobs) == 3
    assert os.path.samefile(get_blob(store, record, "big.bin"), tmp_path / "again" / "weights" / "big.bin")


@pytest.mark.parametrize("damage", [b"", BIG[:-1], b"v" + BIG[1:], BIG + b"w"])
def test_a_damaged_blob_is_quarantined(store: Store, memo: DigestMemo, tmp_path: Path, damage: bytes) -> None:
    record = keep(store, memo, tmp_path / "made")
    blob = get_blob(store, record, "big.bin")
    blob.chmod(0o644)
    blob.write_bytes(damage)
    assert not restore(store, record, tmp_path / "out")
    assert not blob.exists()
    assert [path.name for path in (store.root / "quarantine").iterdir()] == [blob.name]


def test_a_missing_blob_is_a_miss(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    get_blob(store, record, "").unlink()
    assert not restore(store, record, tmp_path / "out")


def test_a_damaged_blob_is_replaced_when_it_is_made_again(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    record = keep(store, memo, tmp_path / "made")
    blob = get_blob(store, record, "big.bin")
    blob.unlink()
    blob.write_bytes(b"junk")
    keep(store, memo, tmp_path / "again")
    assert restore(store, record, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99, "key": "x"}', "null"])
def test_a_damaged_record_is_a_miss(store: Store, memo: DigestMemo, tmp_path: Path, text: str) -> None:
    keep(store, memo, tmp_path / "made")
    path = store.root / "ac" / f"{KEY}.json"
    path.write_text(text)
    assert store.load_record(KEY) is None
    assert not path.exists()


def test_a_record_under_another_key_is_a_miss(store: Store, memo: DigestMemo, tmp_path: Path) -> None:
    keep(store, memo, tmp_path / "made")
    os.rename(store.root / "ac" / f"{KEY}.json", store.root / "ac" / f"{'cd' * 32}.json")
    assert store.load_record("cd" * 32) is None
    assert store.load_record("ef" * 32) is None


def test_outputs_are_checked(memo: DigestMemo, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="did not make its output 'weights'"):
        make_blobs("weights", tmp_path / "nothing", memo)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StepError, match="left its output folder 'weights' empty"):
        make_blobs("weights", tmp_path / "empty", memo)
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "memo")
    (tmp_path / "memo").write_text("")
    with pytest.raises(StepError, match="holds link, which is not a regular file"):
        make_blobs("weights", tmp_path / "empty", memo)


def test_a_store_that_cannot_be_written(memo: DigestMemo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "file", memo)
    assert str(caught.value) == (
        f"the content store {tmp_path / 'file'} cannot be written: Not a directory\n"
        "  hint: point MLCBUILD_STORE at a folder that you may write to, or unset it"
    )
