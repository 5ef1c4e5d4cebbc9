"""The terminal chat, in a pipe and in a terminal of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from running import start_process


def talk(text: str, *arguments: str, log: str = "") -> str:
    """What comes out of the pipe for `text`; the chat must end well, and log nothing without reason."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_process("chat", *arguments, **pipes)
    output, errors = process.communicate(text, timeout=30)
    assert process.returncode == 0
    assert log in errors if log else not errors
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output), "control codes in a pipe"
    return output


def test_a_pipe_gets_replies_and_nothing_else() -> None:
    assert talk("hello\n\nnaïve 😀") == "You said: hello\nYou said: naïve 😀\n"


def test_the_model_sees_the_conversation() -> None:
    output = talk("/system Be brief.\nhello\nprompt\n")
    assert "<im_start|>system\nBe brief.<im_end|>\n<im_start|>user\nhello<im_end|>" in output
    assert "<im_start|>assistant\nYou said: hello<im_end|>\n<im_start|>user\nprompt<im_end|>" in output
    output = talk("hello\n/reset\nprompt\n", "system=Be kind.").split("forgotten")[1]
    assert "hello" not in output
    assert "Be kind." in output


def test_commands() -> None:
    output = talk("/help\n/stats\nhello\n/stats\n/nothing\n/system\n/exit\nnot heard\n")
    assert "/reset         forget the conversation" in output
    assert re.search(r"all replies: 0 tokens in, 0 tokens out", output)
    assert re.search(r"last reply: \d+ tokens in, first token after [\d.]+ s, \d+ tokens, [\d.]+ tokens/s out", output)
    assert "KV cache: 0 of 320 pages in use" in output
    assert "there is no command /nothing; /help lists them" in output
    assert "system: (none)" in output
    assert "not heard" not in output


def test_what_does_not_fit_is_said_and_forgotten() -> None:
    output = talk(f"{'many words ' * 400}\nhello\nprompt\n")
    assert "the context holds 512 tokens, and the prompt has" in output
    assert "/reset" in output
    assert "You said: hello" in output
    assert "many" not in output.split("You said: hello")[1]


def test_a_reply_that_fails_is_said_and_forgotten() -> None:
    output = talk("unusable\nhello\n", log="the largest logit is nan")
    assert "this request failed inside the engine" in output
    assert "You said: hello" in output


def test_a_model_cannot_steer_the_terminal() -> None:
    assert "\ufffd[31mred" in talk("\x1b[31mred\n")


def test_bad_settings() -> None:
    for argument, text in (("temperature=9", "temperature is 9.0"), ("tempreture=1", "did you mean temperature?")):
        process = start_process("chat", argument, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert text in errors
        assert "Traceback" not in errors


class Terminal:
    """A chat in a terminal: type, and read until something has come."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = start_process(
            "chat",
            *arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, timeout: float = 20) -> str:
        """All that has come up to and with `text`, which is then forgotten."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._ours, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert text in self.seen, f"no {text!r} in {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def end_by(self, act: Callable[[], object]) -> int:
        """Do something until the chat has ended; its exit status.

        More than once, because input() cannot see a signal between its prompt and its first wait (a matter of
        microseconds that a person never hits).
        """
        for _ in range(5):
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(4)
                break
        else:
            self.process.kill()
        code = self.process.wait()
        while select.select([self._ours], [], [], 0.1)[0]:
            try:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
            except OSError:
                break
        os.close(self._ours)
        assert "Traceback" not in self.seen
        return code


def take_terminal() -> None:
    """In the child: its standard input becomes the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_in_a_terminal() -> None:
    chat = Terminal()
    chat.wait_for("fake (fake/none/here). /help lists the commands, Ctrl-D ends the chat.")
    chat.wait_for("> ")
    chat.type("hello\r")
    chat.wait_for("You said: hello")
    assert re.search(r"\x1b\[2m\[\d+ tokens, [\d.]+ tokens/s\]\x1b\[0m", chat.wait_for("> "))
    chat.type("slow\r")
    chat.wait_for(" again again")
    chat.type("\x03")
    assert re.search(r"tokens/s, stopped\]", chat.wait_for("> "))
    chat.type("prompt\r")
    assert " again again" in chat.wait_for("<im_start|>user\r\nprompt")
    chat.wait_for("> ")
    assert chat.end_by(lambda: chat.type("\x04")) == 0


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_keys_that_end_it(key: str) -> None:
    chat = Terminal()
    chat.wait_for("> ")
    assert chat.end_by(lambda: chat.type(key)) == 0


def test_a_signal_ends_it() -> None:
    chat = Terminal()
    chat.wait_for("> ")
    assert chat.end_by(lambda: chat.process.send_signal(signal.SIGINT)) == 0
