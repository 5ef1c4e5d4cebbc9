"""A trace of all requests in Chrome's format: when each waited, was read and was answered. Perfetto draws it.

    ./doit serve trace=requests.json      then open chrome://tracing or Perfetto and drop the file there
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from engine.core import Output, Usage
from engine.errors import InvalidSetting

_log = logging.getLogger(__name__)


class Timeline:
    """Writes to a file, request by request. Of a server that was killed the closing bracket is missing, which the
    format allows.

    Raises InvalidSetting when the file cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            self._file: TextIO | None = path.open("w", encoding="utf-8", buffering=1)
            self._file.write("[")
        except OSError as error:
            raise InvalidSetting(f"trace={path}: cannot be written: {error.strerror}", hint="trace=<a file>") from None
        self._before = "\n"  # what separates the next event
        self._clock = clock
        self._start = clock()
        self._arrivals: dict[str, float] = {}
        self._rows: dict[str, int] = {}  # requests at the same time are drawn below each other

    def watch(self, output: Output) -> None:
        """Take note of an Output; called in the engine's thread, which a full disk must not end."""
        name, now, usage = output.request_id, self._clock(), output.usage
        if name not in self._rows:
            self._rows[name] = min(set(range(len(self._rows) + 1)) - set(self._rows.values()))
        if name not in self._arrivals and usage.ttft is not None:
            self._arrivals[name] = now - usage.ttft - (usage.decoding or 0)
        if output.finish_reason is None or self._file is None:
            return
        try:
            self._write(name, self._rows.pop(name), self._arrivals.pop(name, now), now, usage, output.finish_reason)
        except OSError as error:
            _log.warning("the trace ends here: %s", error.strerror)
            self._file = None

    def close(self) -> None:
        """Nothing more will be written."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError), file:
                file.write("\n]\n")

    def _write(self, name: str, row: int, arrival: float, now: float, usage: Usage, reason: str) -> None:
        assert self._file is not None
        about = {"request": name, "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
        about |= {"completion_tokens": usage.completion_tokens, "finish_reason": reason}
        queued = usage.queued or 0.0
        first = arrival + (queued if usage.ttft is None else usage.ttft)
        spans = [("queue", arrival, arrival + queued), ("prefill", arrival + queued, first), ("decode", first, now)]
        for span, start, end in spans:
            if end > start:
                times = {"ts": round((start - self._start) * 1e6), "dur": round((end - start) * 1e6)}
                event = {"name": span, "cat": "request", "ph": "X", **times, "pid": 1, "tid": row, "args": about}
                self._file.write(self._before + json.dumps(event))
                self._before = ",\n"
