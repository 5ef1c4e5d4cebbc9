"""Signals that end a program leave no trace in its exit status, wherever they strike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from fake_models import ROOT

from engine.interrupts import end_on_signal

PROGRAM = """
import os, signal
from engine.interrupts import end_on_signal
with end_on_signal():
    exec("os.kill(os.getpid(), signal.{name})\\nwhile True: pass")  # exec is where Python takes special note of Ctrl-C
print("done")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_exit_status_is_clean(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


def test_what_was_before_comes_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with end_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(ZeroDivisionError), end_on_signal():
        raise ZeroDivisionError
