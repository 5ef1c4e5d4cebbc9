"""Downloads: from a small hub on this machine through huggingface_hub itself, from folders, and random models."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlcbuild.errors import DownloadError, RecipeError, WeightError
from mlcbuild.recipes.schema import Source
from mlcbuild.weights.download import run_download
from mlcbuild.weights.hub import lock_revision
from mlcbuild.weights.source import open_source

REPO, COMMIT = "someone/small", "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 8, "rms_norm_eps": 1e-5}


def make_checkpoint(folder):
    """The files of a small repository, needed ones and others."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": np.arange(4096, dtype=np.float32).reshape(64, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "README.md").write_text("not wanted")
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs."""

    files: dict[str, bytes] = {}
    requests: list[str] = []
    failure: tuple[int, str] | None = None  # status and X-Error-Code for everything
    gated = False  # the listing is public, the files are not
    cut = 0  # bytes after which the next transfer breaks off
    damage = False

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = type(self), self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if hub.failure:
            return self.answer(hub.failure[0], X_Error_Code=hub.failure[1])
        if path == f"/api/models/{REPO}/revision/main":
            return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return self.answer(200, json.dumps([self.describe(name) for name in hub.files]).encode())
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            return self.send_file(path.rpartition("/")[2])
        return self.answer(404, X_Error_Code="RevisionNotFound" if REPO in path else "RepoNotFound")

    def describe(self, name):
        data = self.files[name]
        item = {"type": "file", "path": name, "size": len(data), "oid": hash_blob(data)}
        if name.endswith(".safetensors"):
            item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return item

    def send_file(self, name):
        hub = type(self)
        if hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        data = hub.files[name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else hash_blob(data)
        if hub.damage and name == "model.safetensors":
            data = data[:-1] + b"?"
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET" and hub.cut and name == "model.safetensors":
            body, hub.cut = data[start : start + hub.cut], 0
            headers["Content-Length"] = str(len(data) - start)
            self.answer(200, body, **headers)
            self.close_connection = True
            return None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, data[start:], **headers)


def hash_blob(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def set_endpoint(monkeypatch, url):
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that huggingface_hub talks to, with an empty cache."""
    from huggingface_hub import constants

    folder = make_checkpoint(tmp_path / "repository")

    class OneHub(Hub):
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        requests: list[str] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield OneHub
    server.shutdown()
    thread.join()
    server.server_close()


def download(destination, revision=COMMIT, config=CONFIG, lock=None, reports=None):
    told = reports if reports is not None else []
    source = Source(repo=REPO, revision=revision)

    def report(text, part=None, size=None):
        told.append((text, part))

    return run_download(source, config, destination, report, lock=lock)


def test_only_needed_files_come_and_are_recorded(hub, tmp_path):
    reports = []
    facts = download(tmp_path / "out", reports=reports)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "source.json"])
    assert json.loads((tmp_path / "out" / "source.json").read_text()) == facts
    assert (facts["repo"], facts["revision"], facts["random"]) == (REPO, COMMIT, False)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == hub.files[name]
        sha256 = hashlib.sha256(hub.files[name]).hexdigest()
        assert facts["files"][name] == {"size": len(hub.files[name]), "sha256": sha256}
    assert open_source(tmp_path / "out").read("a.weight", 1, 2)[0, 0] == 64
    assert any(part == 1.0 for _, part in reports)


def test_a_second_download_transfers_nothing_and_works_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    download(tmp_path / "one")
    hub.requests.clear()
    download(tmp_path / "two")
    assert not [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.failure = (500, "")
    assert download(tmp_path / "three")["files"] == download(tmp_path / "one")["files"]


def test_an_interrupted_transfer_resumes(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it has of a chunk is lost
    hub.cut = 5000
    download(tmp_path / "out")
    transfers = [r for r in hub.requests if r.startswith(f"GET /{REPO}/resolve/{COMMIT}/model.safetensors")]
    assert transfers[-1].endswith("bytes=5000-")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_main_is_resolved_once(hub, tmp_path):
    lock = tmp_path / "m.lock.yaml"
    assert download(tmp_path / "one", "main", lock=lock)["revision"] == COMMIT
    assert lock.read_text() == (
        "# Resolved at the first download; delete this file to follow main again.\n"
        f'repo: {REPO}\nrevision: "{COMMIT}"\n'
    )
    hub.requests.clear()
    assert lock_revision(Source(repo=REPO, revision="main"), lock).revision == COMMIT
    assert hub.requests == []
    assert [path.name for path in tmp_path.glob("*.lock*")] == ["m.lock.yaml"]


def test_a_damaged_file_is_refused_and_comes_anew(hub, tmp_path):
    hub.damage = True
    with pytest.raises(DownloadError) as caught:
        download(tmp_path / "out")
    assert caught.value.message.startswith(f"model.safetensors of {REPO} is not what the hub says: sha256 ")
    assert caught.value.hint == "the damaged copy was removed from the cache; run the command again"
    assert not (tmp_path / "out" / "source.json").exists()
    hub.damage = False
    download(tmp_path / "out")


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (
            (404, "RepoNotFound"),
            f"there is no repository {REPO}, or it is private\n"
            "  hint: mend source.repo in the model recipe; if it is private: hf auth login",
        ),
        (
            (404, "RevisionNotFound"),
            f"{REPO} has no revision {COMMIT}\n  hint: mend source.revision in the model recipe",
        ),
    ],
)
def test_errors_of_the_hub(hub, tmp_path, failure, text):
    hub.failure = failure
    with pytest.raises(DownloadError) as caught:
        download(tmp_path / "out")
    assert str(caught.value) == text


def test_a_gated_repository(hub, tmp_path):
    from huggingface_hub import constants

    hub.gated = True
    with pytest.raises(DownloadError) as caught:
        download(tmp_path / "out")
    assert str(caught.value) == (
        f"{REPO} is gated: its publisher wants you to accept terms first\n"
        f"  hint: accept its terms at {constants.ENDPOINT}/{REPO}, then: hf auth login"
    )


def test_no_network_and_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    for revision in (COMMIT, "main"):
        with pytest.raises(DownloadError) as caught:
            download(tmp_path / "out", revision)
        assert str(caught.value) == (
            f"http://127.0.0.1:9 cannot be reached for {REPO}\n"
            "  hint: check the network; HF_ENDPOINT names a mirror; source=random builds without a download"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (COMMIT, "main"):
        with pytest.raises(DownloadError) as caught:
            download(tmp_path / "out", revision)
        assert str(caught.value) == (
            f"{REPO} at {revision} is not in the cache, and HF_HUB_OFFLINE is set\n"
            "  hint: build without offline=1 and HF_HUB_OFFLINE, or with source=random"
        )


def copy(folder, destination, config=CONFIG):
    return run_download(Source(path="x"), config, destination, lambda *_: None, folder=folder)


def test_a_local_folder_is_copied(tmp_path):
    facts = copy(make_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert sorted(facts["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (facts["path"], facts["repo"]) == ("x", None)
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1
    with pytest.raises(DownloadError, match="the source folder .*none does not exist"):
        copy(tmp_path / "none", tmp_path / "out2")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "in")
    with pytest.raises(DownloadError) as caught:
        copy(folder, tmp_path / "out", CONFIG | {"hidden_size": 16, "model_type": "qwen2", "tie_word_embeddings": True})
    assert str(caught.value) == (
        "the checkpoint is not of the shape that the recipe says\n"
        '  model_type: "qwen2" in the recipe, "llama" in config.json\n'
        "  hidden_size: 16 in the recipe, 8 in config.json\n"
        "  hint: mend `config` in the model recipe, or its source"
    )


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("config.json", DownloadError, "config.json is missing"),
        ("model.safetensors", DownloadError, "x has no safetensors weights"),
        ("tokenizer.json", DownloadError, "x has no tokenizer.json"),
    ],
)
def test_missing_files(tmp_path, name, error, text):
    folder = make_checkpoint(tmp_path / "in")
    (folder / name).unlink()
    with pytest.raises(error, match=text):
        copy(folder, tmp_path / "out")


def test_damaged_weights_are_found_at_once(tmp_path):
    folder = make_checkpoint(tmp_path / "in")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(WeightError, match=r"model.safetensors is cut short: \d+ bytes of \d+"):
        copy(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG | {"eos_token_id": [270, 280], "bos_token_id": 260},
        CONFIG | {"eos_token_id": 299, "bos_token_id": 299},
        CONFIG | {"eos_token_id": 128009, "bos_token_id": None},
        CONFIG | {"vocab_size": 259},
    ],
    ids=range(5),
)
def test_random_models_have_a_tokenizer_for_any_text(tmp_path, config):
    tokenizers = pytest.importorskip("tokenizers")
    facts = run_download(Source(random=True, seed=3), config, tmp_path, lambda *_: None)
    assert facts["random"]
    assert facts["seed"] == 3
    assert "model.safetensors" not in facts["files"]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    text = "Grüße, 世界! <|im_start|>user\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|im_start|>") in ids
    assert len(ids) == len("Grüße, 世界! ".encode()) + 1 + len("user\n")
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.token_to_id("<|im_end|>") in ends
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_random_ids_are_those_of_the_config(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    config = CONFIG | {"eos_token_id": [270, 280], "bos_token_id": 260}
    run_download(Source(random=True), config, tmp_path, lambda *_: None)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|im_end|>") == 280
    assert tokenizer.token_to_id("<|endoftext|>") == 270


def test_random_needs_room_for_bytes(tmp_path):
    with pytest.raises(RecipeError, match="vocab_size 258 has no room for 256 bytes and 3 markup tokens"):
        run_download(Source(random=True), CONFIG | {"vocab_size": 258}, tmp_path, lambda *_: None)
