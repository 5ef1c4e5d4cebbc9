"""Settings: where they come from, and the words for those that are wrong."""

from __future__ import annotations

import dataclasses

import pytest

from engine.errors import InvalidSetting
from engine.server.settings import ChatSettings, ServerSettings, get_texts, load_settings


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
        ({"zzz": "1"}, {}, "there is no setting 'zzz'\n  hint: the settings are: host, port, model_name, max_queue, "),
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


def test_every_setting_is_described() -> None:
    assert get_texts(ServerSettings)["port"] == "TCP port to listen on; 0 takes any free one (default 8000)"
    for kind in (ServerSettings, ChatSettings):
        assert list(get_texts(kind)) == [field.name for field in dataclasses.fields(kind)]
        assert all(len(text) > 10 for text in get_texts(kind).values())
