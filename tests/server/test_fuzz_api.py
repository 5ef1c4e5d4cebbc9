"""Requests made from the server's own OpenAPI description, right and wrong ones: each gets an answer that gives away
nothing, and it is never our fault.

What the schema allows is mostly refused for a reason that it does not know (a model's name, a message without content).
So each is sent again with a model and a text that exist, and only a few of the other fields: those reach the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import requests
import schemathesis
from fake_models import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running import Running, run_fake_server
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation

KEY = "key-one-1"
EXAMPLES = 75  # for each way to be right or wrong, of each route
SECONDS = 20  # for one answer; the longest text that fits the context takes two
LEAKS = re.compile(
    rf"{re.escape(str(ROOT))}|Traceback|\.py\b|site-packages|0x[0-9a-f]{{6,}}|object at |/(home|usr|tmp)/"
)
TEXTS: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/tokenize": {"prompt": "hi", "messages": None},
    "/detokenize": {"tokens": [60, 61]},
}


def list_operations(server: Running, key: str) -> list[APIOperation]:
    description = httpx.get(f"{server.url}/openapi.json", headers={"x-api-key": key}).json()
    assert set(TEXTS) <= set(description["paths"])
    return [found.ok() for found in schemathesis.openapi.from_dict(description).get_all_operations()]


def run_cases(
    cases: st.SearchStrategy[schemathesis.Case], examples: int, send: Callable[[schemathesis.Case, bool], None]
) -> None:
    """Call `send(case, swap)` with `examples` cases, always the same ones."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.booleans())
    def run(case: schemathesis.Case, swap: bool) -> None:
        send(case, swap)

    run()


def mend(case: schemathesis.Case, keep: int) -> None:
    """Put a model and a text that exist into a body, and `keep` of the fields that were generated."""
    if isinstance(case.body, dict) and case.path in TEXTS:
        names = sorted(case.body)[:keep]
        case.body = {name: case.body[name] for name in names} | {"model": "fake"} | TEXTS[case.path]


def check(status: int, headers: Any, text: str) -> None:
    assert status < 500, text
    assert not LEAKS.search(text), text
    assert "x-request-id" in headers
    if status >= 400:
        error = json.loads(text)["error"]
        assert isinstance(error["message"], str)
        assert error["message"]


def test_every_route() -> None:
    """Each request as it was generated, to one server, and with a model and a text that exist, to another."""
    codes: dict[str, list[int]] = {}
    with run_fake_server() as unlocked, run_fake_server(keys=[KEY]) as locked, requests.Session() as session:

        def send(case: schemathesis.Case, swap: bool) -> None:
            for number, (server, key) in enumerate([(unlocked, ""), (locked, KEY)][:: -1 if swap else 1]):
                if number:
                    mend(case, len(codes[case.path]) % 4)
                headers = {"Authorization": f"Bearer {key}"} if key else None
                answer = case.call(base_url=server.url, session=session, headers=headers, timeout=SECONDS)
                codes[case.path].append(answer.status_code)
                check(answer.status_code, answer.headers, answer.text)

        for operation in list_operations(locked, KEY):
            codes[operation.path] = []
            # There is nothing different to send to a route that takes nothing, and any text may be a model's name.
            many = bool(operation.body or operation.path_parameters)
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                run_cases(operation.as_strategy(generation_mode=mode), EXAMPLES if many else 1, send)
        for server in (unlocked, locked):
            stats = server.model.engine.get_stats()
            assert (stats.running, stats.waiting) == (0, 0)
            assert server.model.engine.stopped is None
    assert sum(map(len, codes.values())) >= 2000
    assert 401 not in {code for found in codes.values() for code in found}
    for path in TEXTS:
        assert {200, 400} <= set(codes[path]), path


def test_every_route_without_its_key() -> None:
    with run_fake_server(keys=[KEY]) as server, requests.Session() as session:

        def send(case: schemathesis.Case, swap: bool) -> None:
            answer = case.call(base_url=server.url, session=session, timeout=SECONDS)
            assert answer.status_code == (200 if case.path == "/health" else 401), case.path
            check(answer.status_code, answer.headers, answer.text)

        for operation in list_operations(server, KEY):
            run_cases(operation.as_strategy(), 5, send)


def test_what_a_leak_is() -> None:
    for text in (f"{ROOT}/x", 'File "a.py", line 1', "<Engine object at 0x7f3a51c2>", "/usr/lib/x", "Traceback (most"):
        assert LEAKS.search(text)
    assert not LEAKS.search('{"error": {"message": "temperature is 0x, /v1/models"}}')
