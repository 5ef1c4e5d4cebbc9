"""Digests of files and of code."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.errors import StepError
from mlcbuild.graph import code, digest
from mlcbuild.graph.code import CodeDigests
from mlcbuild.graph.digest import DigestMemo, get_stat, load_digest


def make_old(path: Path) -> None:
    """Give a file an mtime that no clock tick can hide a change behind."""
    os.utime(path, (1_000_000_000, 1_000_000_000))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose contents are read, in order."""
    paths: list[Path] = []

    def load(path: Path) -> str:
        paths.append(path)
        return load_digest(path)

    monkeypatch.setattr(digest, "load_digest", load)
    return paths


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 3_000_000)
    make_old(path)
    expected = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert DigestMemo(tmp_path / "memo").get_file_digest(path) == expected
    assert DigestMemo(tmp_path / "memo").get_file_digest(path) == expected
    os.link(path, tmp_path / "b.bin")
    assert DigestMemo(tmp_path / "memo").get_file_digest(tmp_path / "b.bin") == expected
    assert hashed == [path]


def test_same_mtime_other_size_is_noticed(tmp_path: Path) -> None:
    path, memo = tmp_path / "a", DigestMemo(tmp_path / "memo")
    path.write_text("one")
    make_old(path)
    first = memo.get_file_digest(path)
    path.write_text("three")
    make_old(path)
    assert memo.get_file_digest(path) != first


def test_young_files_are_not_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path, memo = tmp_path / "a", DigestMemo(tmp_path / "memo")
    path.write_text("young")
    memo.get_file_digest(path)
    memo.get_file_digest(path)
    assert len(hashed) == 2
    memo.remember(path, load_digest(path))
    hashed.clear()
    memo.get_file_digest(path)
    assert hashed == []


@pytest.mark.parametrize(
    "junk", [b"12 34 5", b"\x00\xff\n", b"1 2 3 4 5\n", b"1 2 3 4 " + b"a" * 63, b"a b c d " + b"a" * 64]
)
def test_a_memo_cut_short_costs_nothing_but_its_last_line(tmp_path: Path, hashed: list[Path], junk: bytes) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
        make_old(path)
    memo = tmp_path / "memo"
    DigestMemo(memo).get_file_digest(paths[0])
    with open(memo, "ab") as file:
        file.write(junk)
    DigestMemo(memo).get_file_digest(paths[1])
    hashed.clear()
    again = DigestMemo(memo)
    assert [again.get_file_digest(path) for path in paths[:2]] == [load_digest(path) for path in paths[:2]]
    assert hashed == []


@pytest.mark.parametrize("place", [5, 60, 90])
def test_a_flipped_digit_is_not_believed(tmp_path: Path, place: int) -> None:
    path, memo = tmp_path / "a", tmp_path / "memo"
    path.write_text("some text")
    make_old(path)
    DigestMemo(memo).get_file_digest(path)
    data = bytearray(memo.read_bytes())
    data[place] ^= 1
    memo.write_bytes(data)
    assert DigestMemo(memo)._known == {}
    assert DigestMemo(memo).get_file_digest(path) == load_digest(path)


def test_a_long_memo_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "COMPACT_LINES", 10)
    path, memo = tmp_path / "a", tmp_path / "memo"
    for second in range(20):
        path.write_text(str(second))
        os.utime(path, (second, second))
        DigestMemo(memo).get_file_digest(path)
    assert len(memo.read_text().split("\n")) < 30
    assert DigestMemo(memo)._known[get_stat(path)] == load_digest(path)


def test_folders(tmp_path: Path) -> None:
    memo, folder = DigestMemo(tmp_path / "memo"), tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("2")
    first = memo.get_input_digest(folder)
    other = tmp_path / "elsewhere"
    os.rename(folder, other)
    assert memo.get_input_digest(other) == first
    (other / "sub" / "b").rename(other / "b")
    assert memo.get_input_digest(other) != first
    with pytest.raises(FileNotFoundError):
        memo.get_input_digest(folder)


def test_a_pattern_sees_only_its_files(tmp_path: Path) -> None:
    memo = DigestMemo(tmp_path / "memo")
    (tmp_path / "a.safetensors").write_text("1")
    first = memo.get_input_digest(tmp_path / "*.safetensors*")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert memo.get_input_digest(tmp_path / "*.safetensors*") == first
    (tmp_path / "a.safetensors.index.json").write_text("{}")
    assert memo.get_input_digest(tmp_path / "*.safetensors*") != first


STEP = '''
"""A step."""
from mlcbuild.graph.plan import get_plan
from codepkg import helper
from codepkg.tools import used, unused as other
import codepkg.whole

LIMIT = 3

def make_actions(plan):
    return other(get_plan())

def run(ctx):
    from codepkg.late import late
    return used(helper.help(LIMIT)) + late() + codepkg.whole.x
'''
FILES = {
    "__init__.py": "",
    "step.py": STEP,
    "helper.py": "import typing\n\ndef help(x):\n    return x\n",
    "tools.py": "BASE = 1\nNOISE = 2\n\ndef used(x):\n    return x + BASE\n\ndef unused(x):\n    return NOISE\n",
    "late.py": "from . import deep\n\ndef late():\n    return deep.VALUE\n",
    "deep.py": "VALUE = 1\n",
    "whole.py": "x = 1\ny = 2\n",
    "dynamic.py": "def a():\n    return 1\n\ndef b():\n    return 2\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package of code in files."""
    folder = tmp_path / "codepkg"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(code, "PACKAGES", ("codepkg", "mlcbuild"))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def get_closure(package: Path, *extra: str) -> dict[str, str]:
    return CodeDigests(package.parent / "code.json").get_closure("codepkg.step", extra)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_imports_are_followed_wherever_they_stand(package: Path) -> None:
    found = get_closure(package)
    assert set(found) == {f"codepkg.{name}" for name in ("step", "helper", "tools", "late", "deep", "whole")}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("step.py", "LIMIT = 3", "LIMIT = 4"),
        ("step.py", "+ late()", "- late()"),
        ("helper.py", "return x", "return -x"),
        ("tools.py", "BASE = 1", "BASE = 2"),
        ("deep.py", "VALUE = 1", "VALUE = 2"),
        ("whole.py", "y = 2", "y = 3"),
        ("tools.py", "NOISE = 2", "NOISE = make()"),
        ("tools.py", "NOISE = 2", "print(1)"),
        ("tools.py", "def unused", "@register\ndef unused"),
        ("__init__.py", "", "import os\nos.umask(0)\n"),
    ],
)
def test_what_the_step_can_feel_counts(package: Path, file: str, old: str, new: str) -> None:
    before = get_closure(package)
    edit(package / file, old, new)
    assert get_closure(package) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("step.py", '"""A step."""', '"""A better step."""\n# with a comment'),
        ("step.py", "return other(get_plan())", "return []"),
        ("tools.py", "return NOISE", "return -NOISE"),
        ("tools.py", "NOISE = 2", "NOISE = 3"),
        ("tools.py", "def used(x):\n", "def used(x):\n\n    'Uses x.'\n    # indeed\n"),
        ("helper.py", "def help(x):\n    return x\n", "def help(\n    x\n):\n    return (x)\n"),
        (
            "helper.py",
            "def help",
            "if typing.TYPE_CHECKING:\n    import codepkg.dynamic\n\ndef help",
        ),
        ("dynamic.py", "return 1", "return 3"),
    ],
)
def test_what_it_cannot_feel_does_not_count(package: Path, file: str, old: str, new: str) -> None:
    before = get_closure(package)
    edit(package / file, old, new)
    assert get_closure(package) == before


def test_code_reached_by_name_is_declared(package: Path) -> None:
    before, part = get_closure(package, "codepkg.dynamic"), get_closure(package, "codepkg.dynamic:a")
    assert "codepkg.dynamic" in before
    edit(package / "dynamic.py", "return 2", "return 3")
    assert get_closure(package, "codepkg.dynamic") != before
    assert get_closure(package, "codepkg.dynamic:a") == part


def test_mistakes_of_a_step_are_named(package: Path) -> None:
    with pytest.raises(StepError, match="there is no module codepkg.nothing"):
        get_closure(package, "codepkg.nothing")
    with pytest.raises(StepError, match="codepkg.dynamic has no function c"):
        get_closure(package, "codepkg.dynamic:c")
    edit(package / "step.py", "def run", "def walk")
    with pytest.raises(StepError, match="codepkg.step has no function run"):
        get_closure(package)


def test_parsed_modules_are_remembered(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = CodeDigests(package.parent / "code.json")
    before = digests.get_closure("codepkg.step")
    digests.save()
    monkeypatch.setattr(code, "make_source", None)
    again = CodeDigests(package.parent / "code.json")
    assert again.get_closure("codepkg.step") == before
    assert package / "deep.py" in again.list_files()


def test_every_python_agrees(package: Path) -> None:
    """Keys are shared between machines, so digests may not depend on the Python that computes them."""
    script = (
        "import sys; from pathlib import Path; from mlcbuild.graph import code;"
        "code.PACKAGES = ('codepkg', 'mlcbuild');"
        "sys.path.insert(0, sys.argv[1]); digests = code.CodeDigests(Path('none'));"
        "print(digests.get_closure('codepkg.step', ('mlcbuild.errors', 'mlcbuild.recipes.schema')))"
    )
    root = str(Path(__file__).parents[2])
    seen = {}
    for name in (sys.executable, "python3.10", "python3.11", "python3.12"):
        command = [name, "-S", "-c", script, str(package.parent)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={"PYTHONPATH": root, "PATH": os.environ["PATH"]},
            )
        except (OSError, subprocess.CalledProcessError):
            continue  # this Python is not installed here
        seen[name] = done.stdout
    assert sys.executable in seen
    assert len(set(seen.values())) == 1
