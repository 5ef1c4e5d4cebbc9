"""Who may ask, from where, and how much: keys, addresses, origins, lengths; and what an answer gives away."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from running import Running, run_fake_server, wait_until

from engine.errors import InvalidSetting
from engine.server import limits
from engine.server.auth import check_exposure, is_loopback, load_keys
from engine.server.settings import ServerSettings

KEYS = ("first-key-1234", "second-key-5678")
HI = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"
LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    settings = ServerSettings(cors="https://page.example", max_body_bytes=4096, max_prompt_chars=100)
    with run_fake_server(settings, KEYS) as running:
        yield running


def list_routes(running: Running) -> list[tuple[str, str]]:
    """Every route of the application: what is tested cannot forget one."""
    routes = []
    pending = list(running.server._app.routes)
    while pending:
        route = pending.pop()
        pending += getattr(getattr(route, "original_router", None), "routes", [])
        path = getattr(route, "path", None)
        if path:
            routes += [(method, path.replace("{name:path}", "fake")) for method in route.methods or ()]
    return sorted(set(routes))


def test_every_route_but_health_wants_a_key(locked: Running) -> None:
    routes = list_routes(locked)
    assert {("POST", PATH), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/health")} <= set(routes)
    with httpx.Client(base_url=locked.url) as http:
        for method, path in [*routes, ("GET", "/"), ("GET", "/nothing"), ("OPTIONS", PATH), ("GET", "/health/")]:
            answer = http.request(method, path)
            if path == "/health":
                assert answer.status_code in (200, 405)
                continue
            assert (path, answer.status_code) == (path, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            if method == "HEAD":
                continue
            error = answer.json()["error"]
            assert error["message"] == "this server wants an API key; send it as 'Authorization: Bearer KEY'"
            if path.startswith("/v1/messages"):  # Anthropic's
                assert error["type"] == "authentication_error"
            else:
                assert error == {**error, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEYS[0]}"}, 200),
        ({"authorization": f"bearer  {KEYS[1]}"}, 200),
        ({"X-Api-Key": KEYS[1]}, 200),
        ({"Authorization": "Bearer wrong", "X-Api-Key": KEYS[1]}, 200),
        ({"Authorization": "Basic bWU6Zmlyc3Qta2V5LTEyMzQ="}, 200),
        ({"Authorization": "Basic bWU6d3Jvbmc="}, 401),
        ({"Authorization": "Basic /"}, 401),
        ({"Authorization": f"Bearer {KEYS[0]}x"}, 401),
        ({"Authorization": KEYS[0]}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": f"Bearer {','.join(KEYS)}"}, 401),
        ({b"X-Api-Key": b"\xff\xfe"}, 401),
    ],
)
def test_keys(locked: Running, headers: dict, status: int) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == status


def test_the_client_of_openai_and_its_error(locked: Running) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        assert client.models.list().data[0].id == "fake"
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**HI)
        assert caught.value.code == "invalid_api_key"


def test_a_browser_is_asked_for_the_key(locked: Running) -> None:
    answer = httpx.get(locked.url, headers={"Accept": "text/html,*/*"})
    assert answer.headers["www-authenticate"] == 'Basic realm="API key as password"'


def test_where_keys_come_from(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# one a line\n\nfile-key-1\n  file-key-2  \n")
    assert load_keys(ServerSettings()) == ()
    settings = ServerSettings(api_key="key-one-1, key-two-2", api_key_file=str(path))
    assert load_keys(settings) == ("key-one-1", "key-two-2", "file-key-1", "file-key-2")
    path.write_text("# none\n")
    for bad, text in [
        (ServerSettings(api_key="short"), "an API key has fewer than 8 characters"),
        (ServerSettings(api_key="schlüssel-eins"), "or others than ASCII's"),
        (ServerSettings(api_key_file=str(path)), "holds no key"),
        (ServerSettings(api_key_file=str(tmp_path / "no")), "cannot be read: No such file or directory"),
    ]:
        with pytest.raises(InvalidSetting, match=text) as caught:
            load_keys(bad)
        assert "short\n" not in str(caught.value)


def test_other_machines_need_a_key() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host)
        check_exposure(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.1", "localhost.evil.example", ""):
        check_exposure(host, KEYS)
        with pytest.raises(InvalidSetting) as caught:
            check_exposure(host, ())
        assert str(caught.value) == (
            f"host={host} lets other machines in, and no API key is set\n"
            "  hint: set one (MLCBUILD_API_KEY=... or api_key_file=...), or listen on host=127.0.0.1"
        )


HOSTS = [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("a.localhost", 200), ("127.9.9.9", 200)]
HOSTS += [("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("10.0.0.1", 403)]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_names_from_elsewhere(http: httpx.Client, locked: Running, host: str, status: int) -> None:
    """A page that has its own name lead to this machine gets nothing, unless it has a key."""
    for path in ("/v1/models", "/", "/metrics"):
        answer = http.get(path, headers={"host": host})
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["code"] == "host_not_allowed"
    assert http.get("/health", headers={"host": host}).status_code == 200
    headers = {"host": host, "authorization": f"Bearer {KEYS[0]}"}
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200


def test_pages_of_other_origins(locked: Running, server: Running) -> None:
    def ask(running: Running, origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.options(running.url + PATH, headers={**headers, "Access-Control-Request-Headers": "authorization"})

    allowed = ask(locked, "https://page.example")
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://page.example")
    for running, origin in [(locked, "https://evil.example"), (server, "https://page.example"), (server, "null")]:
        answer = ask(running, origin)
        assert answer.status_code >= 400
        assert "access-control-allow-origin" not in answer.headers
    # What a page can send without asking first is no JSON.
    assert httpx.post(server.url + PATH, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400


def test_long_bodies(locked: Running) -> None:
    headers = {"X-Api-Key": KEYS[0], "Content-Type": "application/json"}
    error = {"message": "the body is longer than 4096 bytes", "type": "invalid_request_error", "param": None}
    for body in (b"x" * 5000, iter([b"x" * 3000, b"x" * 3000]), iter([b"x" * 100] * 100)):
        answer = httpx.post(locked.url + PATH, content=body, headers=headers)
        assert (answer.status_code, answer.json()) == (413, {"error": {**error, "code": "body_too_large"}})
    long = {**HI, "messages": [{"role": "user", "content": "x" * 60}] * 2}
    answer = httpx.post(locked.url + PATH, json=long, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "string_above_max_length")
    assert answer.json()["error"]["message"] == "the prompt has 120 characters, and this server takes 100; shorten it"


def test_a_body_that_does_not_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)

    def trickle() -> Iterator[bytes]:
        for _ in range(20):
            yield b" "
            time.sleep(0.05)

    answer = httpx.post(server.url + PATH, content=trickle(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [
        http.post(PATH, json=HI, headers={"X-Request-Id": bad}).headers["x-request-id"]
        for bad in ("", "a b", "x" * 129)
    ]
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", name) for name in made)
    assert len(set(made)) == 3


def test_a_flood(server: Running) -> None:
    """200 at once: those that fit run, the others are refused quickly, and the server answers all the while."""
    slow = {"model": "fake", "messages": [{"role": "user", "content": "slow"}], "max_tokens": 20}
    with run_fake_server(ServerSettings(max_queue=4), queue_limit=4) as running:

        async def flood() -> tuple[list[tuple[httpx.Response, float]], float]:
            async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=httpx.Limits()) as http:

                async def ask() -> tuple[httpx.Response, float]:
                    start = time.monotonic()
                    return await http.post(PATH, json=slow), time.monotonic() - start

                await http.get("/health")
                asking = [asyncio.create_task(ask()) for _ in range(200)]
                await asyncio.sleep(0.5)
                start = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                return await asyncio.gather(*asking), time.monotonic() - start

        answers, _ = asyncio.run(flood())
        done = [answer for answer, _ in answers if answer.status_code == 200]
        refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 429]
        assert len(done) + len(refused) == 200
        assert len(done) >= 12
        assert len(refused) >= 100
        for answer, _ in refused:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        # Each is refused as soon as it is read; the client's own 200 connections are most of this time.
        assert sorted(seconds for _, seconds in refused)[len(refused) // 2] < 3
        wait_until(lambda: running.model.engine.get_stats().running == 0)
        assert httpx.post(running.url + PATH, json=HI).status_code == 200


def test_the_page(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from engine.server.app import make_app

    (tmp_path / "parts").mkdir()
    (tmp_path / "index.html").write_text("<p>hi")
    (tmp_path / "parts" / "chat.js").write_text("let x")
    (tmp_path / "secret.py").write_text("no")
    (tmp_path / "link.txt").symlink_to(__file__)
    with run_fake_server() as running, TestClient(make_app(running.model, static=tmp_path), LOCAL) as http:
        page, script = http.get("/"), http.get("/parts/chat.js")
        assert (page.status_code, page.text, page.headers["content-type"]) == (200, "<p>hi", "text/html; charset=utf-8")
        assert (script.text, script.headers["content-type"]) == ("let x", "text/javascript; charset=utf-8")
        for answer in (page, script):
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'" in policy
            assert not re.search(r"unsafe|https?:|\*|data:", policy)
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in (
            "/parts",
            "/parts/",
            "/secret.py",
            "/link.txt",
            "/..%2fapp.py",
            "/parts/../../x.txt",
            "/index.html",
        ):
            assert http.get(path).status_code == 404
    with run_fake_server() as running, TestClient(make_app(running.model, static=tmp_path / "no"), LOCAL) as http:
        assert http.get("/").status_code == 404
