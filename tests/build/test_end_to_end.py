"""What the README promises, with everything real: build tiny, talk to it, serve it, restore it in another checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from real_project import ROOT, copy_project, doit

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture(scope="module")
def project(first_build):
    """A copy of the project with tiny built by the default command."""
    project, done = first_build
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run ")]
    assert sorted(steps) == ["compile", "convert", "download", "package", "reference", "verify"]
    assert ANSWER in done.stdout
    return project


def get_package(project: Path) -> Path:
    (package,) = (project / "artifacts" / "packages").glob("tiny-q4f16_1-*")
    return package


def test_the_package_says_what_it_is(project):
    package = get_package(project)
    manifest = json.loads((package / "manifest.json").read_text())
    record = json.loads((package / "record.json").read_text())
    assert manifest["variant"].startswith("tiny/q4f16_1/")
    assert set(manifest["actions"]) == {"compile", "convert", "download"}
    assert record["reply"] == {"prompt": QUESTION, "text": ANSWER}
    assert record["quality"]["kl"] < 0.03
    assert record["speed"]["decode"] > 0
    assert str(project) not in (package / "manifest.json").read_text()


def test_a_second_build_is_up_to_date(project, store):
    done = doit(project, store, "build")
    assert done.returncode == 0
    assert done.stdout == f"up to date: 1 package (artifacts/packages/{get_package(project).name})\n"


def test_another_checkout_restores_the_same_bytes(project, store, tmp_path):
    other = copy_project(tmp_path)
    done = doit(other, store, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run " not in done.stdout
    ours, theirs = ((get_package(p) / "manifest.json").read_bytes() for p in (project, other))
    assert ours == theirs


def test_a_signed_package_is_checked_on_another_machine(project, store, tmp_path):
    """As far as that machine matters: a copy of the package elsewhere, which no project has built."""
    package, copy = get_package(project), tmp_path / "copy"
    before = {path.name: path.read_bytes() for path in package.iterdir()}
    make_keys(tmp_path)
    signing = {"MLCBUILD_SIGNING_KEY": str(tmp_path / "key.pem")}
    done = doit(project, store, "build", **signing)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"sign  {package.name}  with key " in done.stdout
    assert doit(project, store, "build", **signing).stdout.startswith("up to date")
    shutil.copytree(package, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.name != "signature.json"} == before
    done = check(copy, f"key={tmp_path / 'pub.pem'}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["ok", what] for what in ("files", "provenance", "signature", "machine", "reply")
    ]
    assert lines[-1][2] == repr(ANSWER)
    (copy / "record.json").unlink()  # was measured elsewhere, and is not signed
    assert check(copy, f"key={tmp_path / 'pub.pem'}", "smoke=0").returncode == 0
    shard = copy / "params_shard_0.bin"
    shard.chmod(0o644)
    with open(shard, "r+b") as file:
        file.seek(1000)
        file.write(b"!")
    done = check(copy)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fail  {copy}: params_shard_0.bin was altered: its SHA-256 is ")


def make_keys(folder):
    key = Ed25519PrivateKey.generate()
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "pub.pem").write_bytes(public)


def check(package, *args):
    """`doit verify-package`."""
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "doit", "verify-package", str(package), *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_mistakes_of_verify_package(tmp_path):
    for args, text in (
        (
            [],
            "doit verify-package takes one package, not 0\n"
            "  hint: doit verify-package artifacts/packages/... key=pub.pem",
        ),
        (["x", "kye=a"], "unknown variable 'kye'\n  hint: did you mean key or smoke?"),
        (["x", "smoke=2"], "smoke=2 is neither 1 nor 0"),
        (["x", "key=none.pem"], "the public key none.pem cannot be read: No such file or directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "doit", "verify-package", *args],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"ERROR: {text}\n")


@pytest.mark.parametrize("settings", [{}, {"MLCBUILD_DRAFT": "tiny-draft"}])
def test_chat_answers_a_pipe(project, store, settings):
    """A draft model is built first, and changes nothing."""
    environment = {**os.environ, "PYTHONPATH": str(project), "MLCBUILD_STORE": str(store), "TVM_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "doit", "chat"],
        cwd=project,
        env={**environment, **settings},
        input=f"{QUESTION}\n/exit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ANSWER in done.stdout
    assert ("verify    tiny-draft" in done.stderr) == bool(settings)


@pytest.fixture
def server(project, store):
    """`doit serve` on a free port; the address it prints."""
    environment = {**os.environ, "PYTHONPATH": str(project), "MLCBUILD_STORE": str(store), "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-u", "-m", "doit", "serve", "port=0"]
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said, start = "", time.monotonic()
    assert process.stdout is not None
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
        line = process.stdout.readline()
        assert line, said
        assert time.monotonic() - start < 120, said
        said += line
    yield process, found.group(0)
    process.kill()
    process.wait()
    process.stdout.close()


def test_serve_answers_the_openai_client_and_ends_on_ctrl_c(server):
    process, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)
    with client:
        assert [m.id for m in client.models.list()]
        messages = [{"role": "user", "content": QUESTION}]
        whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert whole.choices[0].message.content == ANSWER
        parts = client.chat.completions.create(model="tiny", messages=messages, temperature=0, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == ANSWER
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in process.stdout.read()


def test_library_calls_work_too(project):
    from engine import LLM, SamplingParams

    with LLM(get_package(project)) as llm:
        reply = llm.chat([{"role": "user", "content": QUESTION}], SamplingParams(temperature=0))
        assert reply.text == ANSWER
