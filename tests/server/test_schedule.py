"""When a request runs and how long it may: priorities and timeouts of every protocol, and pings while it waits."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from fake_models import LIMITS
from running import run_fake_server, wait_until

from engine.core import Limits
from engine.server import sse
from engine.server.settings import ServerSettings

HI = [{"role": "user", "content": "hi"}]
SLOW = [{"role": "user", "content": "slow"}]
CHATS = [
    ("/v1/chat/completions", {"messages": SLOW}),
    ("/v1/messages", {"messages": SLOW, "max_tokens": 400}),
    ("/v1/responses", {"input": "slow"}),
    ("/v1/completions", {"prompt": "<|im_start|>user\nslow<|im_end|>\n<|im_start|>assistant\n", "max_tokens": 400}),
]


@pytest.mark.parametrize(("path", "fields"), CHATS)
def test_a_timeout_ends_a_reply(http: httpx.Client, path: str, fields: dict) -> None:
    answer = http.post(path, json={"model": "fake", **fields, "timeout": 0.2})
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert error["message"].startswith("the reply was not complete after 0.2 s, the timeout of this request")
    streamed = http.post(path, json={"model": "fake", **fields, "timeout": 0.2, "stream": True})
    assert streamed.status_code == 200
    assert "the reply was not complete after 0.2 s" in streamed.text or "failed" in streamed.text
    for wrong in (0, -1):
        refused = http.post(path, json={"model": "fake", **fields, "timeout": wrong})
        assert refused.status_code == 400
        assert "timeout is" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("path", "fields"), CHATS)
def test_priorities_that_do_not_exist(http: httpx.Client, path: str, fields: dict) -> None:
    for wrong in (1001, -1001, 1.5, "high"):
        refused = http.post(path, json={"model": "fake", **fields, "priority": wrong})
        assert refused.status_code == 400
        assert "priority" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("path", "fields"), CHATS)
def test_nobody_overtakes_unless_the_server_allows_it(http: httpx.Client, path: str, fields: dict) -> None:
    """On a server that others use too, a client may ask to run later, and not to run before them."""
    refused = http.post(path, json={"model": "fake", **fields, "priority": -1})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "priority is -1, and this server takes 0 or more; "
        "leave it out, or start the server with least_priority=-1000"
    )
    for priority in (None, 0, 5):
        late = {"priority": priority, "timeout": 0.1}  # it is let in, and then it takes too long
        assert http.post(path, json={"model": "fake", **fields, **late}).status_code == 504


def test_a_smaller_priority_runs_sooner() -> None:
    """One request runs at a time: those that wait are served by their priority, not in their order."""
    limits = Limits(**{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | {"max_batch": 1})
    ended: list[str] = []
    names: dict[str, int] = {}
    with run_fake_server(ServerSettings(least_priority=-9), limits=limits) as running:
        running.model.engine.watch(lambda output: ended.append(output.request_id) if output.finish_reason else None)
        url = f"{running.url}/v1/chat/completions"

        def ask(messages: list, priority: int) -> None:
            body = {"model": "fake", "messages": messages, "priority": priority, "max_tokens": 30}
            names[httpx.post(url, json=body, timeout=30).json()["id"]] = priority

        threads = [threading.Thread(target=ask, args=(SLOW, -9))]
        threads[0].start()
        wait_until(lambda: running.model.engine.get_stats().running == 1)
        for count, priority in enumerate((5, 0, -5), start=1):
            threads.append(threading.Thread(target=ask, args=(HI, priority)))
            threads[-1].start()
            wait_until(lambda count=count: running.model.engine.get_stats().waiting == count)
        for thread in threads:
            thread.join(30)
    assert [names[name] for name in ended] == [-9, -5, 0, 5]


def test_pings_while_nothing_comes(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments, which no client takes for events; none in a stream that does not pause, none after the end."""
    body = {"model": "fake", "messages": [{"role": "user", "content": "drawl one two three"}], "stream": True}
    quick = http.post("/v1/chat/completions", json=body).text
    monkeypatch.setattr(sse, "PING_SECONDS", 0.004)
    slow = http.post("/v1/chat/completions", json=body).text
    ping = sse.PING.decode()
    assert ping not in quick
    assert slow.count(ping) >= 3
    assert slow.endswith("data: [DONE]\n\n")
    events = [line for line in slow.replace(ping, "").split("\n\n") if line][:-1]
    text = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for e in events]
    assert "".join(text) == "one two three"
