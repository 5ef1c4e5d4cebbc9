"""Every setting of the server and of the terminal chat, once: name, type, default and what it does.

A setting is given as name=value on the command line, or else as MLCBUILD_<NAME> in the environment, or else in a YAML
file of `name: value` lines that the setting `settings` names:

    ./doit serve model=tiny port=9000
    MLCBUILD_PORT=9000 ./doit serve
    ./doit serve settings=server.yaml

Standard library only (but for the YAML file), so that the task graph can list settings without importing the server.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import InvalidSetting

PREFIX = "MLCBUILD_"


SPECULATIVE = "guess tokens ahead: lookup = from the text itself, draft = by a small model; default: draft if given"
DRAFT = "the small model: a recipe, built as the large one is, e.g. tiny-draft; or a package's folder, with a /"


def _setting(default: Any, text: str) -> Any:
    """A dataclass field that knows what it does."""
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `./doit serve` takes besides the variables that choose the variant."""

    settings: str = _setting("", "YAML file of settings, for those that are given nowhere else")
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 is the whole network, and needs an api_key")
    port: int = _setting(8000, "TCP port to listen on; 0 takes any free one")
    model_name: str = _setting("", "what clients call the model; default: the model's name, e.g. tiny")
    least_priority: int = _setting(0, "smallest priority that a request may have; smaller runs sooner, and none is 0")
    max_queue: int = _setting(128, "requests that may wait for the engine; one more is refused with 429")
    mode: str = _setting("local", "local = 4 requests at once; interactive = 1; server = many, and most of the memory")
    kv_tokens: int = _setting(0, "tokens that the KV cache holds, over all requests; 0 = what the mode says")
    memory_fraction: float = _setting(0.85, "of the free memory, what the engine may take at most")
    prefix_cache: int = _setting(1, "1 = prompts that begin as earlier ones did re-use their pages; 0 = off")
    cache_file: str = _setting("", "file that keeps those pages (1 GiB at most) until the next start; default: none")
    speculative: str = _setting("", SPECULATIVE)
    draft: str = _setting("", DRAFT)
    draft_tokens: int = _setting(6, "tokens guessed ahead at most, when speculative is on")
    api_key: str = _setting("", "keys, with commas between them; clients must send one of them for all but /health")
    api_key_file: str = _setting("", "file with more keys, one a line; lines that start with # are comments")
    cors: str = _setting("", "origins whose web pages may ask, with commas between them; * = all; default: none")
    max_body_bytes: int = _setting(8 << 20, "a longer body is refused with 413")
    max_prompt_chars: int = _setting(1_000_000, "a longer prompt is refused before it is tokenized")
    trace: str = _setting("", "file to write a trace of all requests to, in Chrome's format; default: none")
    drain_seconds: float = _setting(10.0, "SIGTERM lets running replies go on for so long; Ctrl-C ends them at once")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What `./doit chat` takes besides the variables that choose the variant."""

    settings: str = _setting("", "YAML file of settings, for those that are given nowhere else")
    system: str = _setting("", "the system message")
    temperature: float = _setting(-1.0, "0 = always the likeliest token, up to 2; -1 = what the package says")
    top_p: float = _setting(-1.0, "keep the likeliest tokens up to this probability; -1 = what the package says")
    top_k: int = _setting(-1, "keep this many of the likeliest tokens, 0 = all; -1 = what the package says")
    seed: int = _setting(-1, "the same seed gives the same replies; -1 = another every time")
    max_tokens: int = _setting(0, "end a reply after so many tokens; 0 = what the context holds")
    mode: str = _setting("interactive", "interactive = one full context; local = less memory")
    kv_tokens: int = _setting(0, "tokens that the KV cache holds; 0 = what the mode says")
    memory_fraction: float = _setting(0.85, "of the free memory, what the engine may take at most")
    speculative: str = _setting("", SPECULATIVE)
    draft: str = _setting("", DRAFT)
    draft_tokens: int = _setting(6, "tokens guessed ahead at most, when speculative is on")


METHODS = ("off", "lookup", "draft")
S = TypeVar("S", ServerSettings, ChatSettings)

# Least and greatest value of a setting; the engine checks the sampling ones.
RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "least_priority": (-1000, 0),
    "max_queue": (0, 1_000_000),
    "kv_tokens": (0, 1 << 40),
    "prefix_cache": (0, 1),
    "draft_tokens": (1, 16),
    "max_tokens": (0, 1 << 40),
    "max_body_bytes": (1024, 1 << 30),
    "max_prompt_chars": (1, 1 << 30),
    "drain_seconds": (0, 3600),
}
WORDS = {"int": "a whole number", "float": "a number", "str": "a text"}


def load_settings(kind: type[S], given: Mapping[str, str], environment: Mapping[str, str]) -> S:
    """Settings of `kind` from name=value pairs, then the environment, then the YAML file, then defaults.

    Raises InvalidSetting for a name that is no setting (with the nearest ones), a value that does not fit, or a file
    that cannot be read. Variables of the environment that are no settings are somebody else's.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_names(given, fields, "")
    texts = {name: (text, f"{name}=") for name, text in given.items()}
    for name in fields:
        variable = PREFIX + name.upper()
        if variable in environment:
            texts.setdefault(name, (environment[variable], f"{variable}="))
    path, _ = texts.get("settings", ("", ""))
    written = _load_file(Path(path)) if path else {}
    _check_names(written, [name for name in fields if name != "settings"], f" in {path}")
    for name, text in written.items():
        texts.setdefault(name, (text, f"{path}: {name}: "))
    return kind(**{name: _parse(name, str(fields[name].type), *found) for name, found in texts.items()})


def _check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the settings are: {', '.join(known)}"
            raise InvalidSetting(f"there is no setting '{name}'{where}", hint=hint)


def _load_file(path: Path) -> dict[str, str]:
    """The settings in a YAML file as texts; a list stands for its entries with commas between them."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSetting(f"{path}: cannot be read: {error.strerror}", hint="settings=<a YAML file>") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{path}: not YAML: {error}", hint="write one `name: value` a line") from None
    if not isinstance(values or {}, dict):
        raise InvalidSetting(f"{path}: not a mapping of settings", hint="write one `name: value` a line")
    return {str(name): _to_text(value) for name, value in (values or {}).items()}


def _to_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_to_text(v) for v in value)
    return "" if value is None else str(value)


def get_texts(kind: type[ServerSettings] | type[ChatSettings]) -> dict[str, str]:
    """What each setting of `kind` does, with its default."""
    texts = {}
    for known in dataclasses.fields(kind):
        default = "" if known.default == "" else f" (default {known.default})"
        texts[known.name] = f"{known.metadata['text']}{default}"
    return texts


def get_guessing(settings: ServerSettings | ChatSettings) -> dict[str, Any]:
    """The arguments `draft_tokens` and `draft` of load_model. Raises InvalidSetting where the settings do not fit."""
    method = settings.speculative or ("draft" if settings.draft else "off")
    if method not in METHODS:
        raise InvalidSetting(f"speculative={method}: there is no such way to guess", hint=f"give {', '.join(METHODS)}")
    if (method == "draft") != bool(settings.draft):
        has = f"draft={settings.draft}" if settings.draft else "no draft"
        hint = "give draft=tiny-draft or another small model" if method == "draft" else "leave one of them out"
        raise InvalidSetting(f"speculative={method} with {has}", hint=hint)
    draft = Path(settings.draft) if settings.draft else None
    return {"draft_tokens": 0 if method == "off" else settings.draft_tokens, "draft": draft}


def split_list(text: str) -> list[str]:
    """The entries of a setting that takes several, with commas between them."""
    return [entry for part in text.split(",") if (entry := part.strip())]


def _parse(name: str, kind: str, text: str, where: str) -> Any:
    try:
        value: Any = {"int": int, "float": float, "str": str}[kind](text)
    except ValueError:
        raise InvalidSetting(f"{where}{text}: not {WORDS[kind]}", hint=f"give {WORDS[kind]}") from None
    low, high = RANGES.get(name, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        raise InvalidSetting(f"{where}{text}: out of range", hint=f"give {low} to {high}")
    return value
