"""One thread that owns the engine; everybody else talks to it through queues.

TVM's pool of workers belongs to the thread that launches kernels, so the engine is made, run and closed inside that
one thread. Callers check and submit requests from any thread or event loop and read a Reply. Nothing a caller does can
block the thread: outputs that nobody has read are joined into one, so a slow reader costs no more than its own text.

    thread = EngineThread(lambda: Engine(executor, tokenizer))
    for output in thread.generate(tokens, SamplingParams(temperature=0)):
        print(output.text, end="")
    async with thread.stream(tokens) as reply:      # leaving the block early aborts the request
        async for output in reply: ...
    thread.close()
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.core import FinishReason, Limits, Output, Pooling, Request, SamplingParams, Stats
from engine.errors import EngineError, EngineStopped, InvalidRequest, Overloaded
from engine.reply import AsyncReply, Mailbox, Reply
from engine.request import check_request

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.text.tokenizer import Tokenizer

DEFAULT_QUEUE_LIMIT = 128
_log = logging.getLogger(__name__)


class EngineThread:
    """Starts the thread and waits until `make_engine`, called inside it, has returned.

    `queue_limit`: requests that may wait besides those that can run at once; one more raises Overloaded.
    Raises whatever `make_engine` raises.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, queue_limit: int = DEFAULT_QUEUE_LIMIT) -> None:
        self._watchers: list[Callable[[Output], None]] = []
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _mailboxes, _stopped and the order of submissions
        self._mailboxes: dict[str, Mailbox] = {}
        self._stopped: EngineStopped | None = None
        self._deadline: float | None = None  # of the closing; None = not closing
        ready: queue.SimpleQueue[Engine | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(make_engine, ready), name="engine", daemon=True)
        self._thread.start()
        try:
            engine = ready.get()
        except KeyboardInterrupt:  # let it finish loading, then end it: see the last line
            self.close()
            raise
        if isinstance(engine, BaseException):
            self._thread.join()
            raise engine
        from engine.sampling.grammar import GrammarCompiler  # needs numpy: see make_package_engine

        self.limits: Limits = engine.limits
        self.tokenizer: Tokenizer = engine.tokenizer
        self.grammars = GrammarCompiler(engine.tokenizer)
        self._capacity = engine.limits.max_batch + queue_limit
        self._get_stats = engine.get_stats
        atexit.register(self.close)  # a daemon thread must not be inside TVM while the interpreter ends

    @property
    def stopped(self) -> EngineStopped | None:
        """Why no request is taken any more (closing, closed or dead); None while the engine is well."""
        return self._stopped

    def watch(self, watcher: Callable[[Output], None]) -> None:
        """From now on show `watcher` every Output, inside the thread: it must be quick and not raise."""
        self._watchers.append(watcher)

    def get_stats(self) -> Stats:
        """Counters and gauges of this moment; callable from any thread."""
        return self._get_stats()

    def generate(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        pooling: Pooling | None = None,
    ) -> Reply:
        """Submit now, read as an iterator of Output. Closing or dropping the Reply aborts the request.

        `priority`: smaller runs sooner. After `timeout` seconds the reply ends with DeadlineExceeded. `pooling`: the
        reply is one Output with the prompt's embedding.

        Raises InvalidRequest, Overloaded or EngineStopped at once; later troubles are in the last Output.
        """
        arrived = threading.Event()
        request = _make_request(prompt_tokens, params, request_id, priority, timeout, pooling)
        mailbox = self._submit(request, arrived.set)
        return Reply(mailbox, arrived, self.abort)

    def stream(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        pooling: Pooling | None = None,
    ) -> AsyncReply:
        """As `generate`, for the running event loop. Cancelling the reading task aborts the request."""
        import asyncio  # whose 9 ms only those pay who have a loop

        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        request = _make_request(prompt_tokens, params, request_id, priority, timeout, pooling)

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop is closed: nobody will ever read this
                self.abort(request.request_id)

        return AsyncReply(self._submit(request, wake), arrived, self.abort)

    def abort(self, request_id: str) -> None:
        """End a request: its pages are free within one step, its last Output says "abort". Unknown ids are ignored."""
        self._commands.put(lambda engine: self._abort(engine, request_id))

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests, end the others and join the thread. Callable again.

        drain=True lets them finish, for at most `timeout` seconds; what then remains, or else everything, is aborted.
        """
        with self._lock:
            self._stopped = self._stopped or EngineStopped("the engine is shutting down", hint="start it again")
        wait = (float("inf") if timeout is None else timeout) if drain else 0.0
        deadline = time.monotonic() + wait
        self._commands.put(lambda _: self._set_deadline(deadline))
        if threading.current_thread() is not self._thread:  # a finalizer may run anywhere
            self._thread.join()
        atexit.unregister(self.close)

    def _submit(self, request: Request, wake: Callable[[], None]) -> Mailbox:
        name = request.request_id
        check_request(request, self.limits)
        mailbox = Mailbox(request, wake)
        with self._lock:
            if self._stopped is not None:
                raise EngineStopped(self._stopped.message, hint=self._stopped.hint)
            if len(self._mailboxes) >= self._capacity:
                raise Overloaded(
                    f"the engine is busy: {len(self._mailboxes)} requests are running or waiting",
                    hint="try again later, or raise the queue limit",
                )
            if name in self._mailboxes:
                raise InvalidRequest(f"request id {name} is in use", hint="give every request its own id")
            self._mailboxes[name] = mailbox
            self._commands.put(lambda engine: engine.add(request))
        return mailbox

    # What follows runs inside the thread.

    def _run(self, make_engine: Callable[[], Engine], ready: queue.SimpleQueue[Engine | BaseException]) -> None:
        try:
            engine = make_engine()
        except BaseException as error:  # handed to the constructor, which raises it
            ready.put(error)
            return
        ready.put(engine)
        try:
            self._loop(engine)
            self._end_all("abort", None)
        except BaseException:
            _log.exception("the engine has died")
            stopped = EngineStopped("the engine has died of an internal error", hint="start it again; its log says why")
            with self._lock:
                self._stopped = stopped
            self._end_all("error", stopped)
        finally:
            engine.close()

    def _loop(self, engine: Engine) -> None:
        while True:
            self._run_commands(engine)
            if self._deadline is not None and (not engine.has_work or time.monotonic() >= self._deadline):
                return
            if engine.has_work:
                for output in engine.step():
                    self._deliver(output)

    def _run_commands(self, engine: Engine) -> None:
        """Do what callers have asked for; sleep until somebody asks when there is nothing else to do."""
        block = not engine.has_work and self._deadline is None
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return
            command(engine)
            block = False

    def _abort(self, engine: Engine, request_id: str) -> None:
        output = engine.abort(request_id)
        if output is not None:
            self._deliver(output)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def _deliver(self, output: Output) -> None:
        for watcher in self._watchers:
            watcher(output)
        if output.finish_reason is None:
            self._mailboxes[output.request_id].put(output)
        else:
            with self._lock:
                mailbox = self._mailboxes.pop(output.request_id)
            mailbox.put(output)

    def _end_all(self, reason: FinishReason, error: EngineError | None) -> None:
        with self._lock:
            mailboxes, self._mailboxes = list(self._mailboxes.values()), {}
        for mailbox in mailboxes:
            mailbox.put(Output(mailbox.request_id, "", (), mailbox.usage, reason, error))


def _make_request(
    prompt_tokens: Sequence[int],
    params: SamplingParams | None,
    request_id: str | None,
    priority: int,
    timeout: float | None,
    pooling: Pooling | None,
) -> Request:
    now = time.monotonic()
    deadline = None if timeout is None else now + timeout
    name = request_id or uuid.uuid4().hex
    return Request(name, tuple(prompt_tokens), params or SamplingParams(), now, priority, deadline, pooling)
