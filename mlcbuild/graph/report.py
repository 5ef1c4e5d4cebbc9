"""What a build did, for machines: the JSON file of `--report`, the JUnit XML of `--junit`. Also when it has failed.

    {"schema": 2, "exit_code": 1, "error": "", "seconds": 8.4,
     "steps": [{"step": "convert", "name": "tiny/q4f16_1/rows16", "status": "run", "seconds": 0.8, "bytes": 4123456,
                "saved": 0.0, "error": "", "worker": ""}, ...],
     "packages": [...], "skipped": [{"variant": ..., "reason": ...}]}

`status` is run, hit, remote hit, ok (it was current), skip (`doit ignore`), fail, or not run: the build ended before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from mlcbuild.graph.plan import Skip
    from mlcbuild.graph.reporter import Line
    from mlcbuild.graph.summary import Row

REPORT_SCHEMA = 2
NOT_RUN = "not run"
NOT_XML = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Report:
    """A whole build: its exit code, what ended it if no step did, how long it took (s), and its parts."""

    exit_code: int
    error: str
    seconds: float
    steps: Sequence[Line]
    packages: Sequence[Row]
    skipped: Sequence[Skip]


def write_json(path: Path, report: Report) -> None:
    """The file of `--report`."""
    value = {
        "schema": REPORT_SCHEMA,
        "exit_code": report.exit_code,
        "error": report.error,
        "seconds": round(report.seconds, 3),
        "steps": [asdict(line) for line in report.steps],
        "packages": [asdict(row) for row in report.packages],
        "skipped": [asdict(skip) for skip in report.skipped],
    }
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_junit(path: Path, report: Report) -> None:
    """The file of `--junit`: a test case for each step, and one for each variant that was skipped."""
    suite = ElementTree.Element("testsuite", name="doit build", time=f"{report.seconds:.3f}")
    for line in report.steps:
        case = add_case(suite, line.step, line.name, line.seconds)
        if line.status == "fail":
            add_text(case, "failure", line.error)
        elif line.status in (NOT_RUN, "skip"):
            add_text(case, "skipped", line.status)
        else:
            ElementTree.SubElement(case, "system-out").text = f"{line.status}, {line.bytes} bytes"
    for skip in report.skipped:
        add_text(add_case(suite, "variant", skip.variant, 0.0), "skipped", skip.reason)
    if report.error:
        add_text(add_case(suite, "doit", "build", report.seconds), "error", report.error)
    suite.set("tests", str(len(suite)))
    for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{tag}"))))
    top = ElementTree.Element("testsuites")
    top.append(suite)
    ElementTree.indent(top)
    ElementTree.ElementTree(top).write(path, encoding="utf-8", xml_declaration=True)


def add_case(suite: ElementTree.Element, step: str, name: str, seconds: float) -> ElementTree.Element:
    """A test case of a suite."""
    return ElementTree.SubElement(suite, "testcase", classname=step, name=name, time=f"{seconds:.3f}")


def add_text(case: ElementTree.Element, tag: str, text: str) -> None:
    """Why a case did not pass: the first line as the message, all of it as the text."""
    clean = NOT_XML.sub("", text)
    ElementTree.SubElement(case, tag, message=clean.partition("\n")[0]).text = clean
