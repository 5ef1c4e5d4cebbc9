"""The engine's thread: streams for threads and event loops, aborts, overload, death and shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from small_engines import LIMITS, make_engine, make_talking_engine

from engine.core import Output, SamplingParams, join_outputs
from engine.engine import Engine
from engine.errors import DeadlineExceeded, EngineStopped, InvalidRequest, Overloaded
from engine.runtime.fake import make_hash_model
from engine.thread import EngineThread

GREEDY = SamplingParams(temperature=0.0)
FOREVER = SamplingParams(temperature=0.0, ignore_eos=True)
PROMPT = b"hello\n"


class Gate:
    """A model that says "a" for ever, but only while the gate is open, and takes `delay` seconds for each."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.delay = 0.0
        self.threads: set[int] = set()
        self.failure: BaseException | None = None

    def __call__(self, history: np.ndarray) -> np.ndarray:
        self.threads.add(threading.get_ident())
        assert self.open.wait(10)
        time.sleep(self.delay)
        if self.failure is not None:
            raise self.failure
        logits = np.zeros(LIMITS.vocab_size, np.float32)
        logits[ord("a")] = 9
        return logits


@pytest.fixture
def start() -> Iterator[Callable[..., EngineThread]]:
    threads: list[EngineThread] = []

    def make(factory: Callable[[], Engine] = make_engine, **options: int) -> EngineThread:
        threads.append(EngineThread(factory, **options))
        return threads[-1]

    yield make
    for thread in threads:
        thread.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def read(reply) -> Output:
    outputs = list(reply)
    whole = outputs[0]
    for output in outputs[1:]:
        whole = join_outputs(whole, output)
    return whole


def wait_for_early_end(thread: EngineThread) -> None:
    """Everything is free long before the context would have been full."""
    wait_until(lambda: is_idle(thread))
    assert thread.get_stats().completion_tokens < 60


def is_idle(thread: EngineThread) -> bool:
    stats = thread.get_stats()
    return (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages) and not thread._mailboxes


def test_generate(start) -> None:
    thread = start(lambda: make_talking_engine("Good day"))
    reply = thread.generate(PROMPT, GREEDY, request_id="mine")
    output = read(reply)
    assert (output.request_id, output.text, output.finish_reason) == ("mine", "Good day", "stop")
    assert output.usage.ttft is not None
    assert list(reply) == []
    assert is_idle(thread)


def test_many_threads_and_an_event_loop_get_what_each_would_alone(start) -> None:
    model = make_hash_model(LIMITS.vocab_size)
    alone, shared = start(lambda: make_engine(model=model)), start(lambda: make_engine(model=model))
    params = [SamplingParams(seed=i, max_tokens=5 + i, ignore_eos=True) for i in range(12)]
    wanted = [read(alone.generate([i], p)).text for i, p in enumerate(params)]
    found = [""] * 12

    def ask(i: int) -> None:
        found[i] = read(shared.generate([i], params[i])).text

    async def ask_later(i: int) -> None:
        async with shared.stream([i], params[i]) as reply:
            async for output in reply:
                found[i] += output.text

    async def ask_all() -> None:
        await asyncio.gather(*(ask_later(i) for i in range(6, 12)))

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    asyncio.run(ask_all())
    for worker in workers:
        worker.join()
    assert found == wanted


def test_the_executor_lives_in_one_thread(start, gate) -> None:
    made = []

    def factory() -> Engine:
        made.append(threading.get_ident())
        return make_engine(model=gate)

    gate.open.set()
    thread = start(factory)
    read(thread.generate(PROMPT, FOREVER))
    assert set(made) == gate.threads == {thread._thread.ident} != {threading.get_ident()}


def test_a_slow_reader_gets_everything_in_one_piece(start) -> None:
    thread = start(lambda: make_talking_engine("Good day"))
    reply = thread.generate(PROMPT, GREEDY)
    wait_until(lambda: is_idle(thread))
    assert [(o.text, len(o.token_ids), o.finish_reason) for o in reply] == [("Good day", 9, "stop")]


@pytest.mark.parametrize("way", ["close", "with", "drop", "abort", "interrupt"])
def test_leaving_early_frees_the_pages(start, gate, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = start(lambda: make_engine(model=gate))
    gate.delay = 0.003
    gate.open.set()
    reply = thread.generate(PROMPT, FOREVER)
    next(reply)
    if way == "close":
        reply.close()
    elif way == "with":
        with reply:
            pass
    elif way == "drop":
        del reply
        gc.collect()
    elif way == "abort":
        thread.abort(reply.request_id)
        assert [o.finish_reason for o in reply][-1] == "abort"
    else:

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(reply._mailbox, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(reply)
    wait_for_early_end(thread)


def test_a_timeout_ends_the_reply(start, gate) -> None:
    gate.open.set()
    gate.delay = 0.01
    thread = start(lambda: make_engine(model=gate))
    output = read(thread.generate(PROMPT, FOREVER, timeout=0.1))
    assert (output.finish_reason, type(output.error)) == ("error", DeadlineExceeded)
    assert 1 <= output.usage.completion_tokens < 20
    assert is_idle(thread)
    with pytest.raises(InvalidRequest, match="priority is -2000"):
        thread.generate(PROMPT, FOREVER, priority=-2000)


def test_an_aborted_request_says_so(start, gate) -> None:
    thread = start(lambda: make_engine(model=gate))
    reply = thread.generate(PROMPT, FOREVER)
    thread.abort(reply.request_id)
    thread.abort("nobody")
    gate.open.set()
    assert read(reply).finish_reason == "abort"


@pytest.mark.parametrize("way", ["cancel", "leave", "loop"])
def test_a_task_that_goes_away_frees_the_pages(start, gate, way: str) -> None:
    thread = start(lambda: make_engine(model=gate))
    gate.delay = 0.003

    async def read_for_ever() -> None:
        async with thread.stream(PROMPT, FOREVER) as reply:
            async for _ in reply:
                pass

    async def cancel() -> None:
        task = asyncio.create_task(read_for_ever())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def leave() -> None:
        gate.open.set()
        async with thread.stream(PROMPT, FOREVER) as reply:
            async for _ in reply:
                break

    async def forget() -> object:
        return thread.stream(PROMPT, FOREVER)

    kept = asyncio.run({"cancel": cancel, "leave": leave, "loop": forget}[way]())
    gate.open.set()
    wait_for_early_end(thread)
    del kept


def test_refusals_come_at_once(start, gate) -> None:
    thread = start(lambda: make_engine(model=gate), queue_limit=1)
    with pytest.raises(InvalidRequest, match="the prompt has 200"):
        thread.generate([1] * 200)
    replies = [thread.generate(PROMPT, FOREVER, request_id="a")]
    with pytest.raises(InvalidRequest, match="request id a is in use"):
        thread.generate(PROMPT, request_id="a")
    replies += [thread.generate(PROMPT, FOREVER) for _ in range(LIMITS.max_batch)]
    with pytest.raises(Overloaded) as caught:
        thread.generate(PROMPT)
    assert str(caught.value) == (
        "the engine is busy: 5 requests are running or waiting\n  hint: try again later, or raise the queue limit"
    )
    replies.pop().close()
    gate.open.set()
    wait_until(lambda: len(thread._mailboxes) < 5)
    assert read(thread.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1))).text == "a"


def test_a_dying_executor_ends_everything_cleanly(start, gate, caplog: pytest.LogCaptureFixture) -> None:
    engines: list[Engine] = []

    def factory() -> Engine:
        engines.append(make_engine(model=gate))
        return engines[0]

    thread = start(factory)
    gate.failure = RuntimeError("secret /path")
    replies = [thread.generate(PROMPT, FOREVER) for _ in range(LIMITS.max_batch + 3)]
    gate.open.set()
    outputs = [read(r) for r in replies]
    assert {o.finish_reason for o in outputs} == {"error"}
    message = "the engine has died of an internal error\n  hint: start it again; its log says why"
    assert {str(o.error) for o in outputs} == {message}
    assert all(isinstance(o.error, EngineStopped) for o in outputs)
    assert outputs[0].usage.prompt_tokens == len(PROMPT)
    with pytest.raises(EngineStopped) as caught:
        thread.generate(PROMPT)
    assert str(caught.value) == message == str(thread.stopped)
    thread.close()
    assert engines[0]._executor.closed  # type: ignore[attr-defined]
    assert "secret /path" in caplog.text


def test_an_engine_that_cannot_be_made() -> None:
    def factory() -> Engine:
        raise InvalidRequest("no such thing")

    with pytest.raises(InvalidRequest, match="no such thing"):
        EngineThread(factory)
    assert not [t for t in threading.enumerate() if t.name == "engine"]


def test_close_aborts_what_runs(start, gate) -> None:
    thread = start(lambda: make_engine(model=gate))
    replies = [thread.generate(PROMPT, FOREVER) for _ in range(6)]
    threading.Timer(0.02, gate.open.set).start()
    thread.close()
    assert not thread._thread.is_alive()
    assert {read(r).finish_reason for r in replies} == {"abort"}
    with pytest.raises(EngineStopped, match="the engine is shutting down"):
        thread.generate(PROMPT)
    thread.close()


def test_close_may_let_everything_finish(start, gate) -> None:
    thread = start(lambda: make_engine(model=gate))
    replies = [thread.generate(PROMPT, FOREVER) for _ in range(6)]
    gate.open.set()
    thread.close(drain=True)
    assert {read(r).finish_reason for r in replies} == {"length"}


def test_draining_has_an_end(start, gate) -> None:
    thread = start(lambda: make_engine(model=lambda history: (time.sleep(0.005), gate(history))[1]))
    gate.open.set()
    reply = thread.generate(PROMPT, FOREVER)
    thread.close(drain=True, timeout=0.05)
    assert read(reply).finish_reason == "abort"


def test_an_idle_engine_uses_no_processor_time(start) -> None:
    start()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03
