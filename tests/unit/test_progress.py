"""What the progress lines say: bytes, rates, what is left, what the caches were good for."""

from __future__ import annotations

import io
import os
import time

import pytest

from mlcbuild.graph.progress import PlainView, Running, State, estimate_rest, show_duration
from mlcbuild.graph.reporter import Line, Mail, describe_savings


@pytest.mark.parametrize(
    ("fraction", "expected", "rest"),
    [
        (None, None, None),
        (0.0, None, None),
        (0.25, None, 30.0),
        (0.25, 14.0, 4.0),  # a share that is not of bytes is less certain than the last time
        (None, 14.0, 4.0),
        (None, 6.0, 0.0),
    ],
)
def test_what_is_left_is_judged_by_the_best_there_is(fraction, expected, rest):
    assert estimate_rest(10.0, fraction, expected) == rest


def test_a_running_step_describes_itself(monkeypatch):
    running = Running("download", "m", started=100.0)
    assert running.describe(101.0) == ""
    monkeypatch.setattr(time, "monotonic", lambda: 105.0)
    running.hear("model-1.safetensors", 0.125, 8_000_000_000)
    assert running.describe(105.0) == "model-1.safetensors  1 GB of 8 GB"
    running.hear("model-1.safetensors", 0.25, 8_000_000_000)
    assert running.describe(110.0) == "model-1.safetensors  2 GB of 8 GB  200 MB/s  0:30 left"
    assert running.describe(110.0, 50) == "model-1.safete…  2 GB of 8 GB  200 MB/s  0:30 left"
    assert running.describe(110.0, 30) == "2 GB of 8 GB  200 MB/s  0:30 left"
    running.hear("pass fuse", 0.5, None)
    assert running.describe(110.0) == "pass fuse  50%  0:10 left"
    running.expected = lambda: 3700.0
    assert running.describe(110.0) == "pass fuse  50%  1:01:30 left"
    assert [show_duration(seconds) for seconds in (0.4, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


def test_a_build_describes_itself():
    state = State(total=6, started=0.0)
    assert state.describe(5.0) == "0 of 6 steps  0:05"
    state.ended.update({"run": 2, "hit": 1, "remote hit": 1})
    assert state.describe(65.0) == "4 of 6 steps, 2 from the cache  1:05"


def test_without_a_terminal_a_long_step_speaks_now_and_then():
    stream = io.StringIO()
    view, running = PlainView(stream), Running("convert", "m", time.monotonic() - 20)
    for part in (0.5, 0.6):  # the second comes at once
        running.hear("layer", part, None)
        view.update(running)
    assert stream.getvalue() == "...   convert   m  layer  50%  0:20 left\n"


def test_savings_count_what_the_run_took_less_what_restoring_took():
    lines = [
        Line("convert", "m", "hit", 0.5, saved=100.5),
        Line("compile", "m", "remote hit", 2.0, saved=1.0),
        Line("package", "m", "run", 3.0),
    ]
    assert describe_savings(lines) == ("2 of 3 steps restored (1 from the store, 1 from the remote cache), 1:40 saved")
    assert describe_savings(lines[1:2]) == "1 of 1 steps restored (1 from the remote cache), 0.0 s saved"


def test_messages_of_a_forked_process_arrive():
    heard = []
    mail = Mail(heard.append)
    assert mail.post(["t", "own", None, None]) is False
    child = os.fork()
    if child == 0:
        sent = all(mail.post(["t", f"text {number}", 0.5, 10]) for number in range(100))
        os._exit(0 if sent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mail.open()
    mail.close()
    assert heard == [["t", f"text {number}", 0.5, 10] for number in range(100)]
