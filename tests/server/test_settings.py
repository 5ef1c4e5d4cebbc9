"""Settings: where they come from, and the words for those that are wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engine.errors import InvalidSetting
from engine.server.settings import ChatSettings, ServerSettings, get_guessing, get_texts, load_settings


def test_the_command_line_comes_before_the_environment() -> None:
    environment = {"MLCBUILD_PORT": "9000", "MLCBUILD_HOST": "0.0.0.0", "MLCBUILD_STORE": "/elsewhere"}
    assert load_settings(ServerSettings, {}, {}) == ServerSettings()
    assert load_settings(ServerSettings, {}, environment) == ServerSettings(port=9000, host="0.0.0.0")
    assert load_settings(ServerSettings, {"port": "1"}, environment) == ServerSettings(port=1, host="0.0.0.0")
    assert load_settings(ChatSettings, {"temperature": "0.5", "seed": "3"}, {}).temperature == 0.5


@pytest.mark.parametrize(
    ("given", "environment", "text"),
    [
        ({"prot": "1"}, {}, "there is no setting 'prot'\n  hint: did you mean port?"),
        ({"zzz": "1"}, {}, "there is no setting 'zzz'\n  hint: the settings are: settings, host, port, model_name, "),
        ({"port": "http"}, {}, "port=http: not a whole number\n  hint: give a whole number"),
        ({"port": "70000"}, {}, "port=70000: out of range\n  hint: give 0 to 65535"),
        ({}, {"MLCBUILD_PORT": ""}, "MLCBUILD_PORT=: not a whole number\n  hint: give a whole number"),
        ({}, {"MLCBUILD_MAX_QUEUE": "-1"}, "MLCBUILD_MAX_QUEUE=-1: out of range\n  hint: give 0 to 1000000"),
    ],
)
def test_mistakes(given: dict[str, str], environment: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        load_settings(ServerSettings, given, environment)
    assert str(caught.value).startswith(text)


def test_a_file_comes_last(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("port: 1\nhost: localhost\nmax_queue: 3\napi_key: [one-key-12, other-key]\ncors:\n")
    settings = load_settings(ServerSettings, {"settings": str(path), "max_queue": "5"}, {"MLCBUILD_PORT": "2"})
    assert (settings.port, settings.host, settings.max_queue) == (2, "localhost", 5)
    assert (settings.api_key, settings.cors, settings.settings) == ("one-key-12,other-key", "", str(path))
    assert load_settings(ServerSettings, {}, {"MLCBUILD_SETTINGS": str(path)}).port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "there is no setting 'prot' in {path}\n  hint: did you mean port?"),
        ("settings: other.yaml", "there is no setting 'settings' in {path}\n"),
        ("port: http", "{path}: port: http: not a whole number\n"),
        ("- port", "{path}: not a mapping of settings\n  hint: write one `name: value` a line"),
        ("{", "{path}: not YAML: while parsing a flow node"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSetting) as caught:
        load_settings(ServerSettings, {"settings": str(path)}, {})
    assert str(caught.value).startswith(message.format(path=path))
    with pytest.raises(InvalidSetting, match="no.yaml: cannot be read: No such file or directory"):
        load_settings(ServerSettings, {"settings": "no.yaml"}, {})


def test_every_setting_is_described() -> None:
    assert get_texts(ServerSettings)["port"] == "TCP port to listen on; 0 takes any free one (default 8000)"
    for kind in (ServerSettings, ChatSettings):
        assert list(get_texts(kind)) == [field.name for field in dataclasses.fields(kind)]
        assert all(len(text) > 10 for text in get_texts(kind).values())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"draft_tokens": 0, "draft": None}),
        ({"speculative": "lookup"}, {"draft_tokens": 6, "draft": None}),
        ({"draft": "a/b", "draft_tokens": "3"}, {"draft_tokens": 3, "draft": Path("a/b")}),
        ({"draft": "a/b", "speculative": "draft"}, {"draft_tokens": 6, "draft": Path("a/b")}),
    ],
)
def test_ways_to_guess(given: dict[str, str], wanted: dict) -> None:
    assert get_guessing(load_settings(ServerSettings, given, {})) == wanted
    assert get_guessing(load_settings(ChatSettings, given, {})) == wanted


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"speculative": "on"}, "speculative=on: there is no such way to guess\n  hint: give off, lookup, draft"),
        (
            {"speculative": "draft"},
            "speculative=draft with no draft\n  hint: give draft=tiny-draft or another small model",
        ),
        ({"speculative": "off", "draft": "x"}, "speculative=off with draft=x\n  hint: leave one of them out"),
    ],
)
def test_ways_to_guess_that_do_not_fit(given: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        get_guessing(load_settings(ServerSettings, given, {}))
    assert str(caught.value) == text
