"""How bytes get to a remote cache and back: HTTP (Bazel's protocol), a folder (file://), or whatever fsspec can reach.

A remote is a flat set of names, `ac/<sha256>` and `cas/<sha256>`. Everything is streamed in blocks of 1 MiB, and every
HTTP request has a deadline that grows with its size, so that a server that hangs or drips cannot hold up a build.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import os
import shutil
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mlcbuild.errors import StoreError
from mlcbuild.graph.digest import BLOCK

TIMEOUT = 15.0  # seconds: MLCBUILD_REMOTE_TIMEOUT
CONNECT_TIMEOUT = 5.0
SLOWEST = 256 * 1024  # bytes/s: a server slower than this is taken for one that hangs
JSON = "application/json"
BYTES = "application/octet-stream"
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

Write = Callable[[bytes], object]


class RemoteError(Exception):
    """A remote did not do what was asked. `again`: trying once more may help. `refused`: it says that we may not.
    `damaged`: what it holds under a name is something else."""

    def __init__(self, message: str, *, again: bool = False, refused: bool = False, damaged: bool = False) -> None:
        super().__init__(message)
        self.again = again
        self.refused = refused
        self.damaged = damaged


class DiskError(Exception):
    """What was received could not be written on this machine; the OSError is its cause."""


class Transport(Protocol):
    """A remote's set of names. Methods raise RemoteError, and DiskError when `write` fails."""

    def load(self, name: str, write: Write, limit: int) -> bool:
        """Hand the bytes of `name` to `write`, block by block; False if there is no such name. At most about `limit`
        bytes are read: more is an error."""

    def has(self, name: str, size: int) -> bool:
        """Whether `name` is there, with `size` bytes as far as the remote tells."""

    def save(self, name: str, source: Path | bytes) -> None:
        """Make `name` a file's contents, or these bytes."""


def make_transport(url: str, environment: Mapping[str, str]) -> Transport:
    """The transport of a remote. StoreError for a URL that is none, or whose scheme needs a package that is missing."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        return HttpTransport(url, environment)
    if parts.scheme == "file" and parts.path.startswith("/") and parts.netloc in ("", "localhost"):
        return FolderTransport(Path(urllib.parse.unquote(parts.path)))
    if not parts.scheme or "://" not in url or parts.scheme in ("http", "https", "file"):
        raise StoreError(
            f"remote={url} is not the URL of a cache",
            hint="http://host:port, https://host/prefix, file:///folder, s3://bucket/prefix or gs://bucket/prefix",
        )
    return FsspecTransport(url)


def hide_secrets(url: str) -> str:
    """The URL without user name and password, to be shown."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def make_authorization(parts: urllib.parse.SplitResult, environment: Mapping[str, str]) -> str:
    """The Authorization header: MLCBUILD_REMOTE_TOKEN (bearer), or MLCBUILD_REMOTE_USER and _PASSWORD, or those of the
    URL (basic); "" for none."""
    if environment.get("MLCBUILD_REMOTE_TOKEN"):
        return f"Bearer {environment['MLCBUILD_REMOTE_TOKEN']}"
    user = environment.get("MLCBUILD_REMOTE_USER") or urllib.parse.unquote(parts.username or "")
    password = environment.get("MLCBUILD_REMOTE_PASSWORD") or urllib.parse.unquote(parts.password or "")
    if not user:
        return ""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


class HttpTransport:
    """GET, HEAD and PUT over one kept-open connection per thread and process."""

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        self._parts = urllib.parse.urlsplit(url)
        self._timeout = float(environment.get("MLCBUILD_REMOTE_TIMEOUT") or TIMEOUT)
        authorization = make_authorization(self._parts, environment)
        self._headers = {"Authorization": authorization} if authorization else {}
        self._local = threading.local()

    def __del__(self) -> None:
        if hasattr(self, "_local"):
            self._drop_connection()

    def load(self, name: str, write: Write, limit: int) -> bool:
        """GET."""
        accept = JSON if name.startswith("ac/") else BYTES
        with self._request("GET", name, limit, headers={"Accept": accept}) as response:
            if response.status == 404:
                return False
            self._check(response, "GET", name)
            copy(response, write, limit, name)
        return True

    def has(self, name: str, size: int) -> bool:
        """HEAD."""
        with self._request("HEAD", name, 0) as response:
            if response.status == 404:
                return False
            self._check(response, "HEAD", name)
            return response.getheader("Content-Length", str(size)) == str(size)

    def save(self, name: str, source: Path | bytes) -> None:
        """PUT."""
        headers = {"Content-Type": JSON if name.startswith("ac/") else BYTES}
        with contextlib.ExitStack() as stack:
            body = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(open(source, "rb"))
            size = len(source) if isinstance(source, bytes) else os.fstat(body.fileno()).st_size
            headers["Content-Length"] = str(size)
            with self._request("PUT", name, size, body=body, headers=headers) as response:
                self._check(response, "PUT", name)

    @contextlib.contextmanager
    def _request(
        self, method: str, name: str, size: int, *, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send, and give the response to be read. Whatever goes wrong, until the end of the block, closes the
        connection and is a RemoteError."""
        timer = None
        path = f"{self._parts.path.rstrip('/')}/{name}"
        try:
            connection = self._get_connection()
            seconds = self._timeout + size / SLOWEST
            timer = threading.Timer(seconds, hang_up, [connection.sock])
            timer.daemon = True
            timer.start()
            connection.request(method, path, body=body, headers={**self._headers, **(headers or {})})
            response = connection.getresponse()
            yield response
            response.read(BLOCK)  # what is left of an error page; then the connection can be used again
            if not response.isclosed():
                self._drop_connection()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._drop_connection()
            reason = "it does not answer in time" if isinstance(error, TimeoutError) else str(error) or repr(error)
            raise RemoteError(f"{method} {name[:12]}: {reason}", again=True) from error
        except BaseException:
            self._drop_connection()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _check(self, response: http.client.HTTPResponse, method: str, name: str) -> None:
        status = response.status
        if not 200 <= status < 300:
            raise RemoteError(
                f"{method} {name[:12]}: {status} {response.reason}",
                again=status >= 500 or status in (408, 429),
                refused=status in (401, 403, 405, 413, 507),
            )

    def _get_connection(self) -> http.client.HTTPConnection:
        known = getattr(self._local, "connection", None)
        if known is not None and known[0] == os.getpid():  # never one that was opened before a fork
            return known[1]  # type: ignore[no-any-return]
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(
            self._parts.hostname or "", self._parts.port, timeout=min(CONNECT_TIMEOUT, self._timeout), blocksize=BLOCK
        )
        connection.connect()
        connection.sock.settimeout(self._timeout)
        self._local.connection = (os.getpid(), connection)
        return connection

    def _drop_connection(self) -> None:
        known = getattr(self._local, "connection", None)
        self._local.connection = None
        if known is not None:
            known[1].close()


def hang_up(connected: socket.socket) -> None:
    """End whatever waits for this socket."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def copy(source: Any, write: Write, limit: int, name: str) -> None:
    """Read `source` to its end. RemoteError when that is beyond `limit` bytes, or short of what was announced."""
    announced, total = getattr(source, "length", None), 0
    while block := source.read(BLOCK):
        total += len(block)
        if total > limit:
            raise RemoteError(f"{name[:12]} has more than {limit} bytes")
        try:
            write(block)
        except OSError as error:
            raise DiskError(name) from error
    if announced is not None and total != announced:
        raise RemoteError(f"{name[:12]} ends after {total} of {announced} bytes", again=True)


class FolderTransport:
    """A folder, maybe on a network drive. New files appear by rename."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def load(self, name: str, write: Write, limit: int) -> bool:
        """Read a file."""
        try:
            with open(self._root / name, "rb") as file:
                copy(file, write, limit, name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RemoteError(f"{name[:12]}: {error.strerror}") from error
        return True

    def has(self, name: str, size: int) -> bool:
        """Look at a file."""
        try:
            return os.stat(self._root / name).st_size == size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RemoteError(f"{name[:12]}: {error.strerror}") from error

    def save(self, name: str, source: Path | bytes) -> None:
        """Write a file."""
        path = self._root / name
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if isinstance(source, bytes):
                    scratch.write_bytes(source)
                else:
                    shutil.copyfile(source, scratch)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
        except OSError as error:
            raise RemoteError(f"{name[:12]}: {error.strerror}", refused=True) from error


class FsspecTransport:
    """Object stores and the like. Their own settings (AWS_PROFILE, ...) say who we are and how long they wait."""

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(url)
        except ImportError as error:
            package = EXTRAS.get(scheme)
            hint = f"pip install {package}" if package else f"install the fsspec package for {scheme}://"
            raise StoreError(f"the remote {hide_secrets(url)} needs a package that is missing", hint=hint) from error
        except ValueError as error:
            raise StoreError(f"the remote {hide_secrets(url)}: {error}", hint="see fsspec's list of schemes") from error

    def load(self, name: str, write: Write, limit: int) -> bool:
        """Read an object."""
        try:
            with self._files.open(self._get_path(name), "rb") as file:
                copy(file, write, limit, name)
        except FileNotFoundError:
            return False
        except (RemoteError, DiskError):
            raise
        except Exception as error:  # each file system has its own kinds
            raise RemoteError(f"{name[:12]}: {error}", again=True) from error
        return True

    def has(self, name: str, size: int) -> bool:
        """Ask for an object's size."""
        try:
            return bool(self._files.info(self._get_path(name)).get("size") == size)
        except FileNotFoundError:
            return False
        except Exception as error:
            raise RemoteError(f"{name[:12]}: {error}", again=True) from error

    def save(self, name: str, source: Path | bytes) -> None:
        """Upload an object; those of object stores appear when they are complete."""
        path = self._get_path(name)
        try:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self._files.pipe_file(path, source)
            else:
                self._files.put_file(str(source), path)
        except PermissionError as error:
            raise RemoteError(f"{name[:12]}: {error}", refused=True) from error
        except Exception as error:
            raise RemoteError(f"{name[:12]}: {error}", again=True) from error

    def _get_path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
