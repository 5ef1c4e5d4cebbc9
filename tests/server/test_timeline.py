"""trace=FILE: what each request did and when, in a file that Chrome's tools read."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from running import start_process

from engine.core import Output, Usage
from engine.errors import InvalidSetting
from engine.server.timeline import Timeline


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_spans_and_rows(tmp_path: Path) -> None:
    now = [100.0]
    timeline = Timeline(tmp_path / "trace.json", clock=lambda: now[0])
    now[0] = 103.0  # both arrived at 101, waited for 0.5 s and were read by now
    usage = Usage(10, 1, queued=0.5, ttft=2.0)
    timeline.watch(Output("a", "x", (1,), usage))
    timeline.watch(Output("b", "x", (1,), usage))
    now[0] = 104.0
    timeline.watch(Output("b", "", (2,), Usage(10, 2, queued=0.5, ttft=2.0, decoding=1.0), "stop"))
    timeline.watch(Output("c", "", (), Usage(7), "abort"))  # was never read: nothing to draw
    timeline.watch(Output("d", "x", (1,), Usage(10, 1, queued=0.0, ttft=0.25), "length"))
    killed = (tmp_path / "trace.json").read_text()
    timeline.close()
    timeline.watch(Output("a", "", (), usage, "stop"))
    events = read(tmp_path / "trace.json")
    assert json.loads(killed + "]") == events
    drawn = [(e["args"]["request"], e["name"], e["tid"], e["ts"], e["dur"]) for e in events]
    assert drawn == [
        ("b", "queue", 1, 1_000_000, 500_000),
        ("b", "prefill", 1, 1_500_000, 1_500_000),
        ("b", "decode", 1, 3_000_000, 1_000_000),
        ("d", "prefill", 1, 3_750_000, 250_000),
    ]
    assert {event["ph"] for event in events} == {"X"}
    assert events[0]["args"]["completion_tokens"] == 2


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_to_draw(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "trace.json")
    timeline.close()
    timeline.close()
    assert read(tmp_path / "trace.json") == []


def test_a_full_disk_ends_the_trace_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timeline = Timeline(tmp_path / "trace.json")
    timeline.close()
    timeline._file = FullDisk()
    for name in ("a", "b"):
        timeline.watch(Output(name, "", (1,), Usage(1, 1, queued=0.5, ttft=2.0), "stop"))
    assert caplog.text.count("the trace ends here: No space left on device") == 1


def test_a_file_that_cannot_be() -> None:
    with pytest.raises(InvalidSetting, match="trace=/nowhere/x: cannot be written: No such file or directory"):
        Timeline(Path("/nowhere/x"))


def test_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    process = start_process("serve", "port=0", f"trace={path}", stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if "http://" in line).split("served at ")[1].split("/v1")[0]
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        name = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["id"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert {event["name"] for event in read(path) if event["args"]["request"] == name} >= {"prefill", "decode"}
