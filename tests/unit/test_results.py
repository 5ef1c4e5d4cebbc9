"""The log of what tasks have made: shared by processes, tidied up, and never believed where it is damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from mlcbuild.graph import results
from mlcbuild.graph.results import PATH, Result, ResultLog


def make_result(number: int) -> Result:
    path = f"artifacts/häuser/{number}\t.txt"  # a tab is what separates the parts of a line
    return Result(f"{number:064x}", json.dumps({"n": number}), {path: [1, 2, 3, number]})


def load(root: Path) -> dict[str, Result]:
    return dict(ResultLog(root).load_all())


def test_what_was_added_last_counts(tmp_path: Path) -> None:
    log, other = ResultLog(tmp_path), ResultLog(tmp_path)
    assert log.get("convert:a") is None
    log.add("convert:a", make_result(1))
    log.add("convert:b", make_result(2))
    assert other.get("convert:a") == make_result(1)
    log.add("convert:a", make_result(3))
    assert other.get("convert:a") == make_result(3)
    other.forget("convert:b")
    assert log.get("convert:b") is None
    assert load(tmp_path) == {"convert:a": make_result(3)}
    (tmp_path / PATH).unlink()
    assert log.get("convert:a") is None
    log.forget("convert:a")
    assert load(tmp_path) == {}


def test_a_result_says_what_it_was_made_of() -> None:
    result = make_result(4)
    assert result.made_of == {"n": 4}
    assert json.loads(result.provenance) == {"key": result.key, "made_of": {"n": 4}}


@pytest.mark.parametrize("place", [0, 4, 12, 40, 90, 120, -30, -3])
def test_a_flipped_bit_costs_one_result(tmp_path: Path, place: int) -> None:
    log = ResultLog(tmp_path)
    for number, task in enumerate(("convert:a", "convert:b", "convert:c")):
        log.add(task, make_result(number))
    lines = (tmp_path / PATH).read_bytes().split(b"\n\n")
    line = bytearray(lines[1])
    line[place] ^= 1
    (tmp_path / PATH).write_bytes(b"\n\n".join((lines[0], bytes(line), lines[2])))
    assert load(tmp_path) == {"convert:a": make_result(0), "convert:c": make_result(2)}


def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    log.add("convert:a", make_result(1))
    size = (tmp_path / PATH).stat().st_size
    log.add("convert:a", make_result(2))
    whole = (tmp_path / PATH).stat().st_size
    for end in range(size, whole):
        os.truncate(tmp_path / PATH, end)
        ResultLog(tmp_path).add("convert:b", make_result(3))
        assert load(tmp_path)["convert:b"] == make_result(3)
        assert load(tmp_path).get("convert:a") in (make_result(1), make_result(2), None)
        os.truncate(tmp_path / PATH, size)
        log.add("convert:a", make_result(2))
    assert log.get("convert:a") == make_result(2)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ResultLog(tmp_path)
    log.add("convert:a", make_result(1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    with pytest.raises(OSError, match="No space left on device") as caught:
        log.add("convert:a", make_result(2))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    log.add("convert:b", make_result(3))
    assert load(tmp_path) == {"convert:a": make_result(1), "convert:b": make_result(3)}


def test_a_file_is_not_taken_for_one_whose_inode_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tidied twice, the log may have its first inode again, and as many bytes."""
    monkeypatch.setattr(results, "COMPACT_LINES", 0)
    reader, writer = ResultLog(tmp_path), ResultLog(tmp_path)
    for number in range(100, 300):
        writer.add("convert:a", make_result(number))
        assert writer.get("convert:a") == make_result(number)
        if number % 2:
            assert reader.get("convert:a") == make_result(number)


def add_many(root: Path, task: str) -> None:
    log = ResultLog(root)
    for number in range(300):
        log.add(task, make_result(number))
        assert log.get(task) == make_result(number)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_builds_side_by_side_lose_nothing_while_it_is_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "COMPACT_LINES", 20)
    tasks = [f"convert:{letter}" for letter in "abc"]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=add_many, args=(tmp_path, task)) for task in tasks]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert load(tmp_path) == dict.fromkeys(tasks, make_result(299))
    assert len((tmp_path / PATH).read_bytes().splitlines()) < 300
