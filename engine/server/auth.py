"""API keys: where they come from, who must send one, and the refusal of everybody else.

A client sends a key as OpenAI's clients do (`Authorization: Bearer KEY`), as Anthropic's do (`x-api-key: KEY`), or as a
browser does that asked its user for a password (`Authorization: Basic`, any name). Where keys are set, every route but
/health wants one, those that do not exist included: no table of routes can be forgotten.

Where none are, only this machine can connect; but a web page from elsewhere can have its own name lead here (DNS
rebinding), and the browser then takes us for that page's server. So a request must call us by a name of this machine.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidSetting
from engine.server.errors import make_answer
from engine.server.settings import ServerSettings, split_list

OPEN_PATHS = frozenset({"/health"})
SHORTEST = 8  # characters of a key


def load_keys(settings: ServerSettings) -> tuple[str, ...]:
    """All keys of the settings; none means that nobody needs one. Raises InvalidSetting for a file or key of no use."""
    keys = split_list(settings.api_key)
    if settings.api_key_file:
        keys += _load_key_file(Path(settings.api_key_file))
    if any(len(key) < SHORTEST or not key.isascii() or not key.isprintable() for key in keys):
        raise InvalidSetting(
            f"an API key has fewer than {SHORTEST} characters, or others than ASCII's",
            hint="make one: python3 -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return tuple(keys)


def check_exposure(host: str, keys: Iterable[str]) -> None:
    """Raise InvalidSetting for an address that others can reach without a key to keep them out."""
    if not any(True for _ in keys) and not is_loopback(host):
        raise InvalidSetting(
            f"host={host} lets other machines in, and no API key is set",
            hint="set one (MLCBUILD_API_KEY=... or api_key_file=...), or listen on host=127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name that is not localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyCheck:
    """ASGI middleware that lets nobody pass without one of `keys`; with no keys, everybody who means this machine."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or hand on."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._digests:
            await (self._app if is_own_name(headers.get("host", "localhost")) else refuse_name)(scope, receive, send)
            return
        if self._knows(get_keys(headers)):
            await self._app(scope, receive, send)
            return
        what = "this API key is not known here" if get_keys(headers) else "this server wants an API key"
        answer = make_answer(scope, 401, f"{what}; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        page = "text/html" in headers.get("accept", "")
        answer.headers["WWW-Authenticate"] = 'Basic realm="API key as password"' if page else "Bearer"
        await answer(scope, receive, send)

    def _knows(self, sent: Iterable[str]) -> bool:
        """Compares every digest with every key that was sent, in a time that does not depend on either."""
        known = False
        for key in sent:
            digest = _digest(key)
            for mine in self._digests:
                known |= hmac.compare_digest(digest, mine)
        return known


def is_own_name(host: str) -> bool:
    """Whether a Host header, with its port or without, means this machine."""
    name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
    return is_loopback(name.strip("[]")) or name.endswith(".localhost")


async def refuse_name(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer to a request that calls this machine by a name from elsewhere."""
    text = "this server has no API key, so it answers only to localhost; to call it by another name, set a key"
    await make_answer(scope, 403, text, kind="permission_error", code="host_not_allowed")(scope, receive, send)


def get_keys(headers: Headers) -> list[str]:
    """The keys that a request carries: at most two."""
    keys = [headers["x-api-key"]] if "x-api-key" in headers else []
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        keys.append(value.strip())
    elif scheme.lower() == "basic":
        keys.append(_get_password(value))
    return [key for key in keys if key]


def _get_password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _load_key_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidSetting(f"{path}: cannot be read: {error.strerror}", hint="api_key_file=<a text file>") from None
    except UnicodeDecodeError:
        raise InvalidSetting(f"{path}: not a text file", hint="write one key a line") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise InvalidSetting(f"{path}: holds no key", hint="write one key a line")
    return keys
