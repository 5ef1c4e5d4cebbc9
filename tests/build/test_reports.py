"""What CI reads of a build: --report (JSON) and --junit (XML), also of one that failed, was refused or interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from small_project import VARIANT, doit, make_command, make_environment, make_project, take_log

FILES = ("--report", "out/report.json", "--junit", "out/junit.xml")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def load(project: Path) -> tuple[dict[str, Any], ElementTree.Element]:
    suite = ElementTree.parse(project / "out" / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    return json.loads((project / "out" / "report.json").read_text()), suite


def list_cases(suite: ElementTree.Element) -> list[tuple[str, str, list[str]]]:
    return [(case.get("classname", ""), case.get("name", ""), [child.tag for child in case]) for case in suite]


def test_a_build_that_went_well(project: Path) -> None:
    assert doit(project, "build", *FILES).returncode == 0
    report, suite = load(project)
    assert (report["schema"], report["exit_code"], report["error"]) == (2, 0, "")
    steps = report["steps"]
    assert [(s["step"], s["name"], s["status"], s["error"]) for s in steps] == [
        ("convert", "m/q4/rows16", "run", ""),
        ("package", VARIANT, "run", ""),
        ("verify", VARIANT, "run", ""),
    ]
    assert steps[0]["bytes"] == 100_002  # big.bin and w.txt
    assert all(step["seconds"] > 0 == step["saved"] for step in steps)
    assert report["packages"][0]["kl"] == 0.0125
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "0",
        "errors": "0",
        "skipped": "0",
    }
    assert suite.findtext("testcase/system-out") == "run, 100002 bytes"
    ran = steps[0]["seconds"]
    doit(project, "clean")
    done = doit(project, "build", *FILES)
    assert "3 of 3 steps restored (3 from the store), " in done.stdout
    report, suite = load(project)
    assert [step["status"] for step in report["steps"]] == ["hit"] * 3
    assert 0 < report["steps"][0]["saved"] <= ran
    assert doit(project, "build", *FILES).returncode == 0
    assert [step["status"] for step in load(project)[0]["steps"]] == ["ok"] * 3


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_step_that_fails(project: Path, workers: list[str]) -> None:
    done = doit(project, "build", *FILES, *workers, FAKE_FAIL="mend")
    assert done.returncode == 1
    report, suite = load(project)
    assert (report["exit_code"], report["packages"]) == (1, [])
    assert [(step["step"], step["status"]) for step in report["steps"]] == [
        ("convert", "fail"),
        ("package", "not run"),
        ("verify", "not run"),
    ]
    assert report["steps"][0]["error"] == "shard 3 is cut short\n  hint: doit download:m"
    assert report["steps"][0]["seconds"] > 0
    assert list_cases(suite) == [
        ("convert", "m/q4/rows16", ["failure"]),
        ("package", VARIANT, ["skipped"]),
        ("verify", VARIANT, ["skipped"]),
    ]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert (failure.get("message"), failure.text) == ("shard 3 is cut short", report["steps"][0]["error"])
    assert (suite.get("failures"), suite.get("skipped")) == ("1", "2")


def test_a_bug_keeps_its_traceback_and_no_control_characters(project: Path) -> None:
    convert = project / "tasks" / "convert.py"
    convert.write_text(convert.read_text().replace('"a bug"', '"a \\x1b[31mred\\x1b[0m bug\\x00"'))
    assert doit(project, "build", *FILES, FAKE_FAIL="bug").returncode == 2
    report, suite = load(project)
    text = suite.findtext("testcase/failure")
    assert text is not None
    assert "Traceback" in text
    assert "ZeroDivisionError: a red bug" in text
    assert "\x1b[31m" in report["steps"][0]["error"]


def test_a_build_that_is_refused(project: Path) -> None:
    done = doit(project, "build", "model=mm", *FILES)
    assert (done.returncode, done.stderr) == (3, "ERROR: unknown model 'mm'\n  hint: did you mean m?\n")
    report, suite = load(project)
    assert (report["exit_code"], report["steps"]) == (3, [])
    assert report["error"] == "unknown model 'mm'\n  hint: did you mean m?"
    assert list_cases(suite) == [("doit", "build", ["error"])]


def test_a_build_that_is_interrupted(project: Path) -> None:
    process = subprocess.Popen(
        make_command("build", *FILES),
        cwd=project,
        env=make_environment(project, FAKE_SLEEP="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while "convert" not in (project / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    report, suite = load(project)
    assert (process.returncode, report["exit_code"], report["error"]) == (130, 130, "interrupted")
    assert [step["status"] for step in report["steps"]] == ["not run"] * 3
    assert suite.get("errors") == "1"


def test_skipped_variants_are_in_it(project: Path) -> None:
    target = (project / "recipes/targets/x86-64-v3.yaml").read_text()
    (project / "recipes/targets/other.yaml").write_text(f"{target}toolchain: [nosuch-cc]\n")
    matrix = "axes: {model: [m], quantization: [q4], target: [x86-64-v3, other]}\n"
    (project / "recipes/matrices/nightly.yaml").write_text(matrix)
    assert doit(project, "build", "matrix=nightly", *FILES).returncode == 0
    report, suite = load(project)
    assert report["skipped"] == [{"variant": "m/q4/other", "reason": "this machine has no nosuch-cc"}]
    assert list_cases(suite)[-1] == ("variant", "m/q4/other", ["skipped"])


def test_a_report_that_cannot_be_written_is_said_first(project: Path) -> None:
    (project / "file").write_text("")
    done = doit(project, "build", "--junit", "file/out.xml")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("ERROR: the report file/out.xml cannot be written: ")
    assert done.stderr.endswith("\n  hint: --report FILE, --junit FILE\n")
    assert take_log(project) == []


def test_a_command_has_stdout_to_itself(project: Path) -> None:
    done = doit(project, "serve", "port=8000")
    assert done.returncode == 0
    assert done.stdout == f"serving {VARIANT.replace('/', '-')} 8000\n"
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [
        ["run", "convert"],
        ["run", "package"],
        ["run", "verify"],
    ]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_on_a_terminal_the_running_steps_are_a_tree(project: Path, workers: list[str]) -> None:
    """Also what steps in worker processes say: bytes, rate, time left."""
    convert = project / "tasks" / "convert.py"
    said = "".join(f'    ctx.report("{part} of it", {part}, 2_000_000); time.sleep(0.6)\n' for part in (0.25, 0.5))
    convert.write_text(convert.read_text().replace("    folder = ctx.outputs", f"{said}    folder = ctx.outputs", 1))
    text = run_on_terminal(project, "build", "quantization=*", *workers)
    for part in ("build  ", "of 6 steps", "─ convert", "0.5 of it  1 MB of 2 MB", "B/s", " left", "run   verify"):
        assert part in text, text
    if workers:
        assert "├── convert" in text  # two at once
    assert "Here I am." in text


def run_on_terminal(project: Path, *args: str) -> str:
    """All that doit shows on a terminal."""
    ours, its = os.openpty()
    environment = make_environment(project, TERM="xterm", COLUMNS="160")
    process = subprocess.Popen(make_command(*args), cwd=project, env=environment, stdout=its, stderr=its, stdin=its)
    os.close(its)
    data = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # it has ended
            break
        if not block:
            break
        data += block
    os.close(ours)
    assert process.wait(timeout=60) == 0, data.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())
