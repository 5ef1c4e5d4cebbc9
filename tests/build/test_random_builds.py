"""Random edits, deletions, corruptions and crashes on two checkouts that share a store: every build is as a clean one.

Hypothesis makes up the stories. RANDOM_BUILDS=500 lets it tell more of them.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_project import load_artifacts, load_package, make_project
from forked_doit import Done, Forge
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

# What may be edited: a pattern in a file, and the texts that may stand there.
EDITS = {
    "recipes/models/m/weights.txt": (r".*", ("5", "6", "7")),
    "recipes/models/m.yaml": (r"\A(description: words\n)?family", ("family", "description: words\nfamily")),
    "recipes/quantizations/q4.yaml": (r"bits: \d", ("bits: 4", "bits: 3")),
    "tasks/shared/maths.py": (r"return .*(?=\n\ndef triple)", ("return 2 * x", "return x + x", "return 7 * x  # more")),
    "tasks/compile.py": (r"code for|kode for", ("code for", "kode for")),
    "tasks/package.py": (r"\n+def run", ("\n\ndef run", "\n\n# it must be right\ndef run")),
}
CHOICES = [(file, choice) for file, (_, choices) in EDITS.items() for choice in range(len(choices))]
STEPS = ("download", "convert", "compile", "package", "verify")
CHECKOUTS = st.sampled_from(("one", "two"))
ANY = st.integers(0, 9999)


class Builds(RuleBasedStateMachine):
    """Two checkouts, `one` and `two`, and what was done to them."""

    forge: Forge
    clean: dict[tuple[str, ...], dict[str, str]]  # what a clean build makes of these sources

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.damaged: set[str] = set()  # checkouts with artifacts that somebody has spoiled since the last build
        for name in ("one", "two"):
            make_project(self.folder / name)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def run(self, name: str, *args: str, root: Path | None = None, kill_at: int = 0, **environment: str) -> Done:
        root = root or self.folder / name
        settings = {"MLCBUILD_STORE": str(self.folder / "store"), "FAKE_LOG": str(root / "log"), **environment}
        done = self.forge.run(root, *args, kill_at=kill_at, **settings)
        assert "Traceback" not in done.text, done.text
        return done

    @initialize(built=st.booleans())
    def begin(self, built: bool) -> None:
        if built:
            self.build("one", workers=False)

    @rule(name=CHECKOUTS, edit=st.sampled_from(CHOICES))
    def edit(self, name: str, edit: tuple[str, int]) -> None:
        """Also a revert: there are few texts to choose from."""
        path = self.folder / name / edit[0]
        pattern, choices = EDITS[edit[0]]
        path.write_text(re.sub(pattern, choices[edit[1]], path.read_text(), count=1, flags=re.MULTILINE))

    @rule(name=CHECKOUTS, workers=st.booleans())
    def build(self, name: str, workers: bool) -> None:
        root = self.folder / name
        done = self.run(name, "build", *(("-n", "2") if workers else ()))
        assert done.code == 0, done.text
        assert load_artifacts(root) == self.load_clean(root)
        self.damaged.discard(name)
        again = self.run(name, "build", "--no-snapshot")
        assert again.code == 0
        if not done.text.startswith("up to date"):  # by the snapshot, which cares for what is built, not for .graph
            assert {line[:2] for line in again.text.splitlines()} == {"ok", "up"}, again.text

    @rule(name=CHECKOUTS, kill_at=st.integers(1, 200), workers=st.booleans())
    def crash(self, name: str, kill_at: int, workers: bool) -> None:
        """SIGKILL before a change of a file: of the build, or with workers of one of them."""
        done = self.run(name, "build", *(("-n", "2") if workers else ()), kill_at=kill_at)
        assert done.code in (0, -9) or "a worker was killed (signal 9)" in done.text, done.text
        self.check_packages(name)

    @rule(name=CHECKOUTS, step=st.sampled_from(STEPS))
    def fail(self, name: str, step: str) -> None:
        done = self.run(name, "build", FAKE_FAIL=step)
        assert done.code == 0 or "a fake failure\n  hint: none" in done.text
        self.check_packages(name)

    @rule(name=CHECKOUTS, number=ANY, whole=st.booleans())
    def delete(self, name: str, number: int, whole: bool) -> None:
        """A file, or the folder that it is in, of the artifacts, of the graph's own files or of the store."""
        path = self.pick(name, number)
        if path is not None:
            self.damaged = {"one", "two"}
            if whole:
                shutil.rmtree(path.parent)
            else:
                path.unlink()

    @rule(name=CHECKOUTS, number=ANY, place=st.floats(0, 1), how=st.sampled_from(("flip", "cut", "append", "junk")))
    def corrupt(self, name: str, number: int, place: float, how: str) -> None:
        path = self.pick(name, number)
        if path is None:
            return
        self.damaged = {"one", "two"}  # a hard link may share it
        time.sleep(0.01)  # a clock tick of the file system, without which no stat could tell
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        at = int(place * (len(data) - 1)) if data else 0
        if how == "flip" and data:
            data[at] ^= 1
        elif how == "cut":
            del data[at:]
        elif how == "append":
            data += b"}"
        else:
            data = bytearray(b"\0 junk")
        with open(path, "r+b") as file:  # in place
            file.truncate()
            file.write(data)

    @rule(name=CHECKOUTS, args=st.sampled_from((("stat",), ("verify",), ("gc", "age=0h", "size=0MB"))))
    def upkeep(self, name: str, args: tuple[str, ...]) -> None:
        done = self.run(name, "cache", *args)
        assert done.code == 0 or (done.code == 1 and " is damaged (" in done.text), done.text

    def pick(self, name: str, number: int) -> Path | None:
        """A file that was made."""
        roots = (self.folder / name / "artifacts", self.folder / "store")
        files = sorted(path for root in roots for path in root.rglob("*") if path.is_file())
        return files[number % len(files)] if files else None

    def check_packages(self, name: str) -> None:
        """Where nobody has spoiled anything, packages that look finished are."""
        if name not in self.damaged:
            for folder in (self.folder / name / "artifacts/packages").glob("*"):
                load_package(folder)

    def load_clean(self, root: Path) -> dict[str, str]:
        """What a build of the same sources makes in a new folder with a new store."""
        sources = tuple((root / file).read_text() for file in EDITS)
        if sources not in self.clean:
            other = make_project(self.folder / "clean")
            for file, text in zip(EDITS, sources, strict=True):
                (other / file).write_text(text)
            done = self.run("", "build", root=other, MLCBUILD_STORE=str(self.folder / "clean/store"))
            assert done.code == 0, done.text
            self.clean[sources] = load_artifacts(other)
            shutil.rmtree(other)
        return self.clean[sources]


@pytest.fixture
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


def test_every_build_is_as_a_clean_one(forge: Forge) -> None:
    machine = type("Builds", (Builds,), {"forge": forge, "clean": {}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("RANDOM_BUILDS", "20")),
            derandomize="RANDOM_BUILDS" not in os.environ,  # CI tells the same stories every time
            stateful_step_count=15,
            deadline=None,
            phases=(Phase.generate,),  # shrinking takes many minutes, and the stories are short
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
