"""Ctrl-C and SIGTERM as a way to end, for programs that run until somebody stops them. Standard library only."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(KeyboardInterrupt):
    """Somebody wants us to end. A KeyboardInterrupt proper would set Python's exit status even when it is caught."""


@contextlib.contextmanager
def end_on_signal() -> Iterator[None]:
    """Both are a KeyboardInterrupt inside, which leaves the block without a word. For the main thread."""
    before = [signal.signal(number, _end) for number in SIGNALS]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended
