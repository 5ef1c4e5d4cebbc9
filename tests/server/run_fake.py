"""`run_fake.py serve name=value ...` or `run_fake.py chat name=value ...`: the server or the chat with a fake model.

On SIGUSR1 it prints the bytes of memory that are in use: what its allocator has handed out, not what it keeps. With
PYTHONMALLOC=malloc that is all there is.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

from fake_models import load_fake

from engine.errors import EngineError
from engine.interrupts import end_on_signal
from engine.server.settings import ChatSettings, ServerSettings, load_settings


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")],
        *[(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")],
    ]


def print_memory(*_: object) -> None:
    gc.collect()
    look = ctypes.CDLL(None).mallinfo2
    look.restype = Mallinfo
    found = look()
    print(f"in use: {found.uordblks + found.hblkhd}", flush=True)


def main(what: str, pairs: list[str]) -> None:
    given = dict(pair.split("=", 1) for pair in pairs)
    if what == "serve":
        from engine.server.serve import print_line, run_server

        settings = load_settings(ServerSettings, given, os.environ)

        def load():
            print("loading", flush=True)
            return load_fake(name=settings.model_name or "fake", queue_limit=settings.max_queue)

        run_server(load, settings, print_line)
    else:
        from engine.chat import run_chat

        chat_settings = load_settings(ChatSettings, given, os.environ)
        model = load_fake()
        try:
            run_chat(model, chat_settings)
        finally:
            model.engine.close()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, print_memory)
    try:
        with end_on_signal():
            main(sys.argv[1], sys.argv[2:])
    except EngineError as error:
        sys.exit(str(error))
