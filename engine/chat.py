"""A chat in the terminal: the reply appears as it is made, Ctrl-C stops it, Ctrl-D or /exit ends the chat.

With a pipe instead of a terminal, each line that comes in is a message and nothing but the replies goes out:

    echo "What is the capital of France?" | ./doit chat
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TextIO

from rich.console import Console

from engine.core import FinishReason, Request, SamplingParams, Usage
from engine.errors import EngineError
from engine.model import LoadedModel
from engine.request import check_request
from engine.server.settings import ChatSettings

HELP = """\
/stats         speed of the last reply, and what the engine holds
/reset         forget the conversation
/system TEXT   set the system message; without TEXT, show it
/exit          end the chat, as Ctrl-D does
/help          this list
Ctrl-C stops a reply."""

# What a model writes must not steer the terminal: control characters but tab and line feed are shown as U+FFFD.
VISIBLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def run_chat(
    model: LoadedModel, settings: ChatSettings, stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout
) -> None:
    """Talk until the input ends. Raises InvalidRequest for sampling settings that the engine refuses."""
    params = make_params(settings, model.defaults)
    check_request(Request("settings", (0,), params, 0.0), model.engine.limits)
    terminal = stdin.isatty() and stdout.isatty()
    console = Console(file=stdout, force_terminal=terminal, no_color=not terminal, markup=False, emoji=False)
    chat = Chat(model, params, settings.system, console)
    # Ctrl-C where nothing is being said: at the prompt.
    with contextlib.suppress(KeyboardInterrupt):
        if terminal:
            chat.note(f"{model.name} ({model.variant}). /help lists the commands, Ctrl-D ends the chat.")
        for line in read_lines(stdin, terminal):
            if not chat.answer(line):
                return
    if terminal:
        console.out()


def read_lines(stdin: TextIO, terminal: bool) -> Iterator[str]:
    """The lines that a person or a pipe gives; bytes that are no UTF-8 become U+FFFD."""
    with contextlib.suppress(AttributeError):  # only real files have it
        stdin.reconfigure(errors="replace")  # type: ignore[attr-defined]
    if not terminal:
        yield from stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` its line editing and history
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def make_params(settings: ChatSettings, defaults: SamplingParams) -> SamplingParams:
    """What the settings say of sampling, and the package's own defaults for the rest."""
    return replace(
        defaults,
        temperature=defaults.temperature if settings.temperature == -1 else settings.temperature,
        top_p=defaults.top_p if settings.top_p == -1 else settings.top_p,
        top_k=defaults.top_k if settings.top_k == -1 else settings.top_k,
        seed=None if settings.seed == -1 else settings.seed,
        max_tokens=settings.max_tokens or None,
    )


class Chat:
    """One conversation, which `answer` takes further line by line."""

    def __init__(self, model: LoadedModel, params: SamplingParams, system: str, console: Console) -> None:
        self._model = model
        self._params = params
        self._system = system
        self._console = console
        self._messages: list[dict[str, Any]] = []
        self._usage: Usage | None = None

    def answer(self, line: str) -> bool:
        """Obey a command or answer a message. False ends the chat."""
        line = line.strip()
        if line.startswith("/"):
            return self._obey(*line.partition(" ")[::2])
        if line:
            self._reply(line)
        return True

    def note(self, text: str) -> None:
        """Say something that is not the model's."""
        self._console.out(text, style="dim", highlight=False)

    def _obey(self, command: str, text: str) -> bool:
        if command == "/exit":
            return False
        if command == "/help":
            self.note(HELP)
        elif command == "/stats":
            self._show_stats()
        elif command == "/reset":
            self._messages.clear()
            self.note("the conversation is forgotten")
        elif command == "/system":
            self._system = text.strip() or self._system
            self.note(f"system: {self._system or '(none)'}")
        else:
            self.note(f"there is no command {command}; /help lists them")
        return True

    def _reply(self, text: str) -> None:
        """Stream the reply to a message; both become part of the conversation unless the engine refused."""
        said: list[str] = []
        question = {"role": "user", "content": text}
        try:
            reason = self._stream([*self._messages, question], said)
        except EngineError as error:
            if said:
                self._console.out()
            self._console.out(f"{error}\n  or /reset, to begin again", style="red", highlight=False)
            return
        except KeyboardInterrupt:
            reason = "abort"
        self._console.out()
        self._messages += [question, {"role": "assistant", "content": "".join(said)}]
        self._show_end(reason)

    def _stream(self, messages: list[dict[str, Any]], said: list[str]) -> FinishReason | None:
        """Show the reply and put it into `said`, piece by piece; why it ended. Raises what the engine raises."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        self._usage = None
        tokens = self._model.engine.tokenizer.encode_chat([*system, *messages])
        with self._model.engine.generate(tokens, self._params) as reply:
            for output in reply:
                said.append(output.text)
                self._usage = output.usage
                self._console.out(output.text.translate(VISIBLE), end="", highlight=False)
                if output.error is not None:
                    raise output.error
                if output.finish_reason is not None:
                    return output.finish_reason
        return None

    def _show_end(self, reason: FinishReason | None) -> None:
        """How fast it was, and whether it is whole; a pipe gets replies only."""
        if not self._console.is_terminal or self._usage is None:
            return
        ends = {"abort": ", stopped", "length": ", cut: no room for more"}
        self.note(f"[{describe_speed(self._usage)}{ends.get(reason or '', '')}]")

    def _show_stats(self) -> None:
        stats = self._model.engine.get_stats()
        if self._usage is not None:
            usage = self._usage
            ttft = "" if usage.ttft is None else f", first token after {usage.ttft:.3f} s"
            self.note(f"last reply: {usage.prompt_tokens} tokens in{ttft}, {describe_speed(usage)} out")
        self.note(f"all replies: {stats.prompt_tokens} tokens in, {stats.completion_tokens} tokens out")
        if stats.guesses:
            mean = stats.right_tokens / stats.guesses
            self.note(f"guesses: {stats.right_tokens} of {stats.guessed_tokens} tokens right, {mean:.1f} at a time")
        self.note(f"KV cache: {stats.num_pages - stats.free_pages} of {stats.num_pages} pages in use")


def describe_speed(usage: Usage) -> str:
    """`12 tokens, 61.0 tokens/s`."""
    rate = "" if usage.decode_rate is None else f", {usage.decode_rate:.1f} tokens/s"
    return f"{usage.completion_tokens} token{'' if usage.completion_tokens == 1 else 's'}{rate}"
