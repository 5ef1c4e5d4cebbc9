"""./doit bench on the embedded model: interrupted, it leaves what it has measured, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.bench import busy
from engine.errors import InvalidSetting
from mlcbuild.errors import MlcbuildError
from tasks.bench import make_wanted, run_bench

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tasks.bench import run_bench
run_bench(Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:]))
"""
DODO = """
from pathlib import Path
from tasks.bench import run_bench
def task_bench():
    return {"actions": [(run_bench, [Path("artifacts/packages/%s").absolute(), {"rounds": "60", "cases": "decode"}])]}
"""
KEEP = """
import time
from engine.bench.busy import keep_busy
with keep_busy(0.5) as process:
    print(process.pid, flush=True)
    time.sleep(60)
"""


def start(package: Path, *variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(package), *variables]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_bench_goes_on(tiny_package: Path, tmp_path: Path) -> None:
    packages, reports = tmp_path / "artifacts/packages", tmp_path / "artifacts/reports"
    packages.mkdir(parents=True)
    package = packages / tiny_package.name
    package.symlink_to(tiny_package)
    whole, partial = (reports / f"bench-{package.name}{end}" for end in (".json", ".partial.json"))
    variables = "rounds=60", "cases=decode,prefill-128"  # of a few hundredths of a second: so that it is ended in time
    with start(package, *variables) as first:
        until = time.monotonic() + 120
        while not (partial.exists() and json.loads(partial.read_text())["turns"]):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        said, progress = first.communicate()
    assert first.returncode == -signal.SIGINT
    assert said.startswith("PARTIAL: tiny/q4f16_1/")
    assert said.endswith(f"PARTIAL: what was measured is in artifacts/reports/{partial.name}\n")
    assert progress.startswith("engine, batch 1, greedy\n")
    left = json.loads(partial.read_text())
    assert not left["complete"]
    assert 0 < len(left["turns"]) < 120
    assert partial.with_suffix(".txt").read_text().startswith("PARTIAL: tiny/q4f16_1/")

    with start(package, *variables) as second:
        said, _ = second.communicate()
    assert second.returncode == 0
    assert said.startswith(f"goes on from {len(left['turns'])} turns in artifacts/reports/{partial.name}; without it ")
    assert said.endswith(f"written to artifacts/reports/{whole.name}\n")
    record = json.loads(whole.read_text())
    assert record["turns"][: len(left["turns"])] == left["turns"]
    assert {f["name"]: f["rounds"] for f in record["figures"]} == {"prefill 128": 60, "decode": 60}
    assert all(f["slowest"] <= f["rate"] <= f["fastest"] for f in record["figures"])
    assert (record["overheads"], record["start"]) == (left["overheads"], left["start"])
    assert len(record["overheads"]) == 6
    assert record["start"]["seconds"] > 0
    assert record["read_gb_per_s"] > 0
    assert record["peak_gops"] > 0
    assert record["kernels"]["embedding"] == 1
    assert sorted(path.name for path in reports.iterdir()) == [whole.name, whole.with_suffix(".txt").name]


STARTING, ROUNDS = "while another process starts the package", "in the rounds"


@pytest.mark.parametrize(
    ("moment", "number", "how"),
    [
        (STARTING, signal.SIGINT, "interrupted"),
        (STARTING, signal.SIGTERM, "terminated"),
        (ROUNDS, signal.SIGTERM, "terminated"),
    ],
)
def test_an_ended_bench_leaves_what_it_has_and_no_process(
    tiny_package: Path, tmp_path: Path, moment: str, number: signal.Signals, how: str
) -> None:
    (tmp_path / "artifacts/packages").mkdir(parents=True)
    (tmp_path / "artifacts/packages" / tiny_package.name).symlink_to(tiny_package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # it names our `doit run`
    (tmp_path / "dodo.py").write_text(DODO % tiny_package.name)
    partial = tmp_path / f"artifacts/reports/bench-{tiny_package.name}.partial.json"
    with subprocess.Popen(
        [sys.executable, "-m", "doit", "run", "-v2", "bench"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until = time.monotonic() + 120
        while not is_at(moment, partial, process.pid):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        said, errors = process.communicate()
    assert list_session(process.pid) == []
    assert process.returncode == 130, errors
    assert errors.endswith(f"\n{how}: finished steps are kept, the same command goes on from here\n")
    assert "Traceback" not in errors
    assert said.endswith(f"PARTIAL: what was measured is in artifacts/reports/{partial.name}\n")
    assert len(json.loads(partial.read_text())["overheads"]) == 6


def is_at(moment: str, partial: Path, session: int) -> bool:
    if not partial.exists():
        return False
    record = json.loads(partial.read_text())
    if moment == ROUNDS:
        return bool(record["turns"])
    return len(record["overheads"]) == 6 and len(list_session(session)) > 1


def list_session(session: int) -> list[int]:
    """The processes that it has."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"cases": "decode-at-200"}, "cases=decode-at-200: there is no case 'decode-at-200'\n  hint: give some of "),
        ({"minutes": "0"}, "minutes=0 is not a number above 0\n  hint: doit bench minutes=10"),
        ({"minutes": "soon"}, "minutes=soon is not a number above 0\n  hint: doit bench minutes=10"),
        ({"rounds": "0"}, "rounds=0 is not a positive number\n  hint: doit bench rounds=5"),
        ({"rows": "4", "peer": "openvino"}, "peer= means nothing with rows=\n  hint: leave peer= or rows= out"),
        ({"guesses": "4", "minutes": "1"}, "minutes= means nothing with guesses=\n  hint: leave minutes= or guesses= "),
        ({"busy": "50", "peer": "openvino"}, "peer= means nothing with busy=\n  hint: leave peer= or busy= out"),
        ({"plot": "x.gif"}, "plot=x.gif is no kind of picture\n  hint: plot=x.svg"),
    ],
)
def test_variables_that_mean_nothing_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises((MlcbuildError, InvalidSetting)) as caught:
        make_wanted(variables)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("percent", ["0", "half", "101"])
def test_what_no_core_can_be_busy(tiny_package: Path, percent: str) -> None:
    with pytest.raises(
        MlcbuildError, match=f"^busy={percent} is not a number from 1 to 100\n  hint: doit bench busy=50$"
    ):
        run_bench(tiny_package, {"busy": percent})


def test_beside_a_busy_core(
    tiny_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "SECONDS", 0.2)
    monkeypatch.setattr(busy, "SETTLE", 0.1)
    run_bench(tiny_package, {"busy": "100", "cases": "decode,prefill-2048", "rounds": "2"})
    title, decode = capsys.readouterr().out.splitlines()  # tiny's context has no room for the other
    assert title.split() == ["tokens/s", "alone", "a", "core", "100", "%", "busy", "kept"]
    name, alone, beside, kept = decode.split()
    assert name == "decode"
    assert min(float(alone), float(beside), float(kept)) > 0


def test_the_other_program_works_as_much_as_it_is_told_and_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", KEEP], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        stat = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
        start = time.monotonic()
        while int(stat.read_text().split()[13]) < 30:  # hundredths of a second
            time.sleep(0.02)
        assert time.monotonic() - start > 0.4
        parent.kill()
    until = time.monotonic() + 60
    while stat.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_unknown_peer_is_refused_before_anything_is_loaded(tiny_package: Path) -> None:
    with pytest.raises(InvalidSetting, match="^peer=ollama: there is no such peer\n  hint: give llama-cpp, openvino$"):
        run_bench(tiny_package, {"peer": "ollama"})
