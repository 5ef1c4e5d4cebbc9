"""doit serve and doit chat: what they do before a package is opened, and what they take from one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import CannotListen, InvalidSetting, PackageInvalid
from engine.model import load_defaults
from engine.server.serve import open_socket
from tasks.chat import run_terminal
from tasks.serve import run_serve

NO_PACKAGE = Path("artifacts/packages/tiny-q9f9-nowhere")


def test_the_variables_of_the_selection_are_no_settings() -> None:
    selection = {"model": "tiny", "target": "cpu", "source": "random"}
    with pytest.raises(PackageInvalid, match="there is no such package"):
        run_serve(NO_PACKAGE, {**selection, "port": "0"})
    with pytest.raises(PackageInvalid, match="there is no such package"):
        run_terminal(NO_PACKAGE, selection)
    with pytest.raises(InvalidSetting, match="there is no setting 'temperature'"):
        run_serve(NO_PACKAGE, {"temperature": "1"})
    with pytest.raises(InvalidSetting, match="there is no setting 'port'"):
        run_terminal(NO_PACKAGE, {"port": "1"})


def test_a_taken_port_is_said_before_the_package_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_socket("127.0.0.1", 0) as taken:
        monkeypatch.setenv("MLCBUILD_PORT", str(taken.getsockname()[1]))
        with pytest.raises(CannotListen):
            run_serve(NO_PACKAGE, {})


def test_sampling_defaults_of_a_package(tmp_path: Path) -> None:
    manifest = SimpleNamespace(recipes={"model": {"chat": {"stop": ["<end>"]}}})
    files = {"chat_config": tmp_path / "chat.json", "manifest": manifest}
    package = SimpleNamespace(**files, generation_config=tmp_path / "generation.json")

    def load(config: dict, generation: dict | None) -> tuple[float, float, int]:
        (tmp_path / "chat.json").write_text(json.dumps(config))
        (tmp_path / "generation.json").write_text(json.dumps(generation))
        path = None if generation is None else tmp_path / "generation.json"
        params = load_defaults(SimpleNamespace(**files, generation_config=path))  # type: ignore[arg-type]
        assert params.stop == ("<end>",)
        return params.temperature, params.top_p, params.top_k

    assert load({}, None) == (1.0, 1.0, 0)
    assert load({"temperature": 0.6, "top_p": 0.9}, {}) == (0.6, 0.9, 0)
    assert load({"temperature": 0.7, "top_p": 0.8}, {"do_sample": True, "top_k": 20}) == (0.7, 0.8, 20)
    assert load({"temperature": 1.0}, {"do_sample": False}) == (0.0, 1.0, 0)
    assert load_defaults(package).repetition_penalty == 1.0
    (tmp_path / "generation.json").write_text('{"repetition_penalty": 1.1}')
    assert load_defaults(package).repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("name", "text"),
    [("lib.so", "lib.so cannot be loaded: "), ("tokenizer.json", "tokenizer.json: cannot read the tokenizer: ")],
)
def test_a_package_that_was_damaged(tiny_package: Path, tmp_path: Path, name: str, text: str) -> None:
    """What its sizes do not show; that files are missing or cut is seen before anything is loaded."""
    package = tmp_path / tiny_package.name
    shutil.copytree(tiny_package, package)
    size = (package / name).stat().st_size
    (package / name).unlink()  # it may be read-only
    (package / name).write_bytes(b"\0" * size)
    with pytest.raises(PackageInvalid) as caught:
        run_serve(package, {"port": "0"})
    assert text in str(caught.value)
    assert "build" in str(caught.value).splitlines()[-1]
