"""A remote cache that is plain nginx with ci/nginx.conf: what one checkout pushes, another restores."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_project import ROOT, doit, make_project, take_log

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# User `ci` with the password `secret`, as `openssl passwd -apr1 -salt mlcbuild secret` makes it.
USERS = "ci:$apr1$mlcbuild$NmH0mzuWLqBq6uuL17V0H0\n"
WRITER = {"MLCBUILD_REMOTE_USER": "ci", "MLCBUILD_REMOTE_PASSWORD": "secret"}
STEPS = ["convert 4", "package", "verify"]

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Where nginx keeps what it is given."""
    folder = tmp_path / "served"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def url(tmp_path: Path, files: Path) -> Iterator[str]:
    """The address of nginx."""
    assert NGINX is not None
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    text = (ROOT / "ci/nginx.conf").read_text()
    for old, new in (
        ("listen 9090", f"listen 127.0.0.1:{port}"),
        ("/var/cache/mlcbuild", str(files)),
        ("/etc/nginx/mlcbuild.users", str(tmp_path / "users")),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "users").write_text(USERS)
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; {user} worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
        f"events {{}}\nhttp {{\n{text}\n}}\n"
    )
    with subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]) as process:
        try:
            wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(500):
        assert process.poll() is None
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("nginx does not listen")


def build(root: Path, url: str, **settings: str) -> tuple[list[str], list[str]]:
    """How the steps ended, and the warnings."""
    done = doit(root, "build", f"remote={url}", MLCBUILD_REMOTE_TIMEOUT="5", **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("run ", "hit ", "remote hit "))]
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warn ")]
    return ["remote hit" if line.startswith("remote") else line.split()[0] for line in lines], warnings


def find_blob(files: Path) -> Path:
    """The blob of big.bin."""
    (path,) = [path for path in (files / "cas").iterdir() if path.stat().st_size == 100_000]
    return path


def test_what_one_checkout_builds_another_restores(url: str, files: Path, tmp_path: Path) -> None:
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two")
    assert build(one, url, **WRITER) == (["run"] * 3, [])
    assert take_log(one) == STEPS
    assert len(list((files / "ac").iterdir())) == 3
    assert list((files / "incoming").rglob("*.*")) == []
    assert build(two, url) == (["remote hit"] * 3, [])  # whoever reads needs no password
    assert take_log(two) == []
    for path in (one / "artifacts/packages").rglob("*"):
        if path.is_file():
            assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()


def test_push_and_pull(url: str, tmp_path: Path) -> None:
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two")
    assert doit(one, "build").returncode == 0
    pushed = doit(one, "cache", "push", f"remote={url}", **WRITER)
    assert (pushed.returncode, pushed.stdout.splitlines()[-1]) == (0, "3 pushed, 0 not built here"), pushed.stderr
    pulled = doit(two, "cache", "pull", f"remote={url}")
    assert (pulled.returncode, pulled.stdout.splitlines()[-1]) == (0, "3 pulled, 0 here already, 0 not there")
    assert doit(two, "build", "--offline").stdout.count("hit ") == 3
    assert take_log(two) == []


@pytest.mark.parametrize("password", [{}, {**WRITER, "MLCBUILD_REMOTE_PASSWORD": "wrong"}])
def test_without_the_password_nothing_is_written(
    url: str, files: Path, tmp_path: Path, password: dict[str, str]
) -> None:
    one = make_project(tmp_path / "one")
    statuses, (warning,) = build(one, url, **password)
    assert statuses == ["run"] * 3
    assert warning.startswith(f"warn  remote cache {url}: PUT cas/")
    assert warning.endswith(": 401 Unauthorized; nothing more is written to it")
    assert not (files / "ac").exists()


@pytest.mark.parametrize("damage", [b"x" * 50_000, b"x" * 99_999 + b"y"], ids=["cut", "flipped"])
def test_a_damaged_blob_is_noticed_and_replaced(url: str, files: Path, tmp_path: Path, damage: bytes) -> None:
    one, two, three = (make_project(tmp_path / name) for name in ("one", "two", "three"))
    assert build(one, url, **WRITER) == (["run"] * 3, [])
    blob = find_blob(files)
    data = blob.read_bytes()
    blob.write_bytes(damage)
    said = f"warn  remote cache {url}: cas/{blob.name} is damaged; it is made anew"
    assert build(two, url, **WRITER) == (["run", "remote hit", "remote hit"], [said])
    for path in (one / "artifacts/packages").rglob("*"):
        if path.is_file():
            assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()
    assert blob.read_bytes() == data
    assert build(three, url) == (["remote hit"] * 3, [])
