"""Every setting of the server and of the terminal chat, once: name, type, default and what it does.

A setting is given as name=value on the command line, or else as MLCBUILD_<NAME> in the environment:

    ./doit serve model=tiny port=9000
    MLCBUILD_PORT=9000 ./doit serve

Standard library only, so that the task graph can list settings without importing the server.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.errors import InvalidSetting

PREFIX = "MLCBUILD_"


def _setting(default: Any, text: str) -> Any:
    """A dataclass field that knows what it does."""
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `./doit serve` takes besides the variables that choose the variant."""

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 lets every machine in the network ask")
    port: int = _setting(8000, "TCP port to listen on; 0 takes any free one")
    model_name: str = _setting("", "what clients call the model; default: the model's name, e.g. tiny")
    max_queue: int = _setting(128, "requests that may wait for the engine; one more is refused with 429")
    kv_tokens: int = _setting(0, "tokens that the KV cache holds, over all requests; 0 = what the engine thinks fit")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What `./doit chat` takes besides the variables that choose the variant."""

    system: str = _setting("", "the system message")
    temperature: float = _setting(-1.0, "0 = always the likeliest token, up to 2; -1 = what the package says")
    top_p: float = _setting(-1.0, "keep the likeliest tokens up to this probability; -1 = what the package says")
    top_k: int = _setting(-1, "keep this many of the likeliest tokens, 0 = all; -1 = what the package says")
    seed: int = _setting(-1, "the same seed gives the same replies; -1 = another every time")
    max_tokens: int = _setting(0, "end a reply after so many tokens; 0 = what the context holds")
    kv_tokens: int = _setting(0, "tokens that the KV cache holds; 0 = what the engine thinks fit")


S = TypeVar("S", ServerSettings, ChatSettings)

# Least and greatest value of a setting; the engine checks the sampling ones.
RANGES = {"port": (0, 65535), "max_queue": (0, 1_000_000), "kv_tokens": (0, 1 << 40), "max_tokens": (0, 1 << 40)}
WORDS = {"int": "a whole number", "float": "a number", "str": "a text"}


def load_settings(kind: type[S], given: Mapping[str, str], environment: Mapping[str, str]) -> S:
    """Settings of `kind` from name=value pairs, then the environment, then defaults.

    Raises InvalidSetting for a name that is no setting (with the nearest ones) or a value that does not fit. Variables
    of the environment that are no settings are somebody else's.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the settings are: {', '.join(fields)}"
            raise InvalidSetting(f"there is no setting '{name}'", hint=hint)
    values: dict[str, Any] = {}
    for name, known in fields.items():
        variable = PREFIX + name.upper()
        if name in given:
            values[name] = _parse(name, str(known.type), given[name], f"{name}=")
        elif variable in environment:
            values[name] = _parse(name, str(known.type), environment[variable], f"{variable}=")
    return kind(**values)


def get_texts(kind: type[ServerSettings] | type[ChatSettings]) -> dict[str, str]:
    """What each setting of `kind` does, with its default."""
    texts = {}
    for known in dataclasses.fields(kind):
        default = "" if known.default == "" else f" (default {known.default})"
        texts[known.name] = f"{known.metadata['text']}{default}"
    return texts


def _parse(name: str, kind: str, text: str, where: str) -> Any:
    try:
        value: Any = {"int": int, "float": float, "str": str}[kind](text)
    except ValueError:
        raise InvalidSetting(f"{where}{text}: not {WORDS[kind]}", hint=f"give {WORDS[kind]}") from None
    low, high = RANGES.get(name, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        raise InvalidSetting(f"{where}{text}: out of range", hint=f"give {low} to {high}")
    return value
