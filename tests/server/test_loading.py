"""While the model loads: the server lives, says that it is not ready, and explains a model that cannot be loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from fake_models import load_fake

from engine.bench.load import find_model
from engine.errors import PackageInvalid, ServerUnusable
from engine.model import LoadedModel
from engine.server.serve import Server, get_url, open_socket
from engine.server.settings import ServerSettings

KEY = {"Authorization": "Bearer key-one-1"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TOLD = {"message": "the model is loading; try again in a moment", "type": "server_error", "param": None}
TOLD["code"] = "service_unavailable"


class Slow:
    """A server whose model is loaded once the gate is open."""

    def __init__(self, load: Callable[[], LoadedModel], **options: object) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.failure: BaseException | None = None
        self.model: LoadedModel | None = None
        self._load = load
        listener = open_socket("127.0.0.1", 0)
        self.url = get_url(listener)
        self.server = Server(self._wait, started=lambda model: self.started.set(), **options)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._run, args=(listener,))
        self.thread.start()

    def _wait(self) -> LoadedModel:
        assert self.gate.wait(20)
        self.model = self._load()
        return self.model

    def _run(self, listener: object) -> None:
        try:
            self.server.run([listener])  # type: ignore[list-item]
        except PackageInvalid as error:
            self.failure = error

    def end(self) -> None:
        self.gate.set()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.model is not None:
            self.model.engine.close()


@contextlib.contextmanager
def start_slowly(load: Callable[[], LoadedModel] = load_fake, **options: object) -> Iterator[Slow]:
    slow = Slow(load, **options)
    try:
        yield slow
    finally:
        slow.end()


def test_what_is_answered_meanwhile() -> None:
    with start_slowly() as slow, httpx.Client(base_url=slow.url) as http:
        assert (http.get("/health").status_code, http.get("/health").json()) == (200, {"status": "ok"})
        early = [http.get(path) for path in ("/ready", "/v1/models", "/metrics", "/", "/no-such-path")]
        early += [http.post(path, json=CHAT) for path in ("/v1/chat/completions", "/v1/responses")]
        for answer in early:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json() == {"error": TOLD}
            assert answer.headers["x-request-id"].startswith("req_")
            assert "refresh" not in answer.headers
        with pytest.raises(ServerUnusable, match="HTTP 503, .*\n  hint: wait until it has loaded its model"):
            find_model(f"{slow.url}/v1")
        anthropic = http.post("/v1/messages", json=CHAT).json()
        assert (anthropic["type"], anthropic["error"]["message"]) == ("error", TOLD["message"])
        assert http.get("/", headers={"Accept": "text/html,*/*"}).headers["refresh"] == "1"
        slow.gate.set()
        assert slow.started.wait(20)
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_the_gate_is_shut_from_the_start() -> None:
    """Keys, names from elsewhere and other origins are looked at before there is a model."""
    with start_slowly(keys=["key-one-1"]) as slow, httpx.Client(base_url=slow.url) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 401
        assert http.get("/ready", headers=KEY).status_code == 503
    with start_slowly(settings=ServerSettings(cors="https://a.example")) as slow:
        assert httpx.get(f"{slow.url}/ready", headers={"Host": "b.example"}).status_code == 403
        answer = httpx.get(f"{slow.url}/ready", headers={"Origin": "https://a.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (503, "https://a.example")


def test_a_client_that_comes_too_early_is_served() -> None:
    """OpenAI's client comes again by itself when it has been told to."""
    with start_slowly() as slow:
        refused = threading.Event()

        def note(answer: httpx.Response) -> None:
            if answer.status_code == 503:
                refused.set()

        def open_gate() -> None:
            assert refused.wait(20)
            slow.gate.set()

        opening = threading.Thread(target=open_gate)
        opening.start()
        http = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", http_client=http) as client:
            reply = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
        opening.join()
        assert reply.choices[0].message.content == "You said: hi"


def test_a_model_that_cannot_be_loaded() -> None:
    """What the load says is said by `run`, and nobody is left waiting."""

    def fail() -> LoadedModel:
        raise PackageInvalid("there is no such package", hint="./doit build")

    with start_slowly(fail) as slow:
        assert httpx.get(f"{slow.url}/health").status_code == 200
        slow.gate.set()
        slow.thread.join(20)
        assert isinstance(slow.failure, PackageInvalid)
        assert not slow.started.is_set()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{slow.url}/health")


def test_ending_before_it_is_loaded() -> None:
    """The load is waited for, and what it has loaded is closed."""
    with start_slowly() as slow:
        assert httpx.get(f"{slow.url}/health").status_code == 200
        slow.server.should_exit = True
        slow.thread.join(0.5)
        assert slow.thread.is_alive()
        slow.gate.set()
        slow.thread.join(20)
        assert slow.model is not None
        assert slow.model.engine.stopped is not None
        assert not slow.started.is_set()
