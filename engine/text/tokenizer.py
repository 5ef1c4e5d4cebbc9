"""The tokenizer of a package: text to tokens and back, the model's end tokens, and its chat template.

    tokenizer = load_tokenizer(Path("artifacts/packages/tiny-q4f16_1-x86-64-v4"))
    tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from engine.errors import InvalidRequest, PackageInvalid
from engine.text.stream import ByteDetokenizer, Detokenizer
from engine.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    from engine.text.template import ChatTemplate

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Immutable after construction; safe to use from several threads at once."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, end_tokens: frozenset[int], template: ChatTemplate | None = None
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may come with either, left from training
        backend.no_padding()
        self._backend = backend
        self.end_tokens = end_tokens
        self.template = template
        self.token_bytes = TokenBytes(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizers library's object, for reading only."""
        return self._backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with the model's own beginning (such as BOS) unless told otherwise.

        Raises InvalidRequest for half of a surrogate pair, which JSON can bring in and UTF-8 cannot hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "the text holds half of a surrogate pair, which is no character",
                hint="send valid Unicode",
                param="messages",
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def count(self, text: str) -> int:
        """Tokens of a text that came from this tokenizer."""
        return len(self._backend.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; bytes that are no UTF-8 become replacement characters."""
        text: str = self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def make_detokenizer(self) -> ByteDetokenizer | Detokenizer:
        """What decodes one reply, token by token."""
        known = self.token_bytes
        return ByteDetokenizer(known.get_shown) if known.make_text else Detokenizer(self.decode)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Tokens of a conversation rendered by the chat template; see ChatTemplate.render.

        Raises InvalidRequest when there is no template or it refuses the messages.
        """
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template", hint="send a plain prompt to the completions interface instead"
            )
        text = self.template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)  # the template has written them


def load_tokenizer(folder: Path, *, marks: str = "", backend: tokenizers.Tokenizer | None = None) -> Tokenizer:
    """Read tokenizer.json, unless `backend` is what is in it, and, where present, the configuration files beside it.

    Control tokens that occur in `marks` are text: decoded as any other, for those who read calls and thoughts from it.
    End tokens are those of generation_config.json and mlc-chat-config.json and the eos_token of tokenizer_config.json.
    Raises PackageInvalid for files that are missing or cannot be read.
    """
    from engine.text.template import ChatTemplate  # whose Jinja would keep read_backend waiting

    backend = backend or read_backend(folder)
    config = _load_json(folder / "tokenizer_config.json")
    special = {name: text for name in SPECIAL_TOKENS if (text := _get_text(config.get(name)))}
    ends: list[int | None] = [*_get_ids(folder / "generation_config.json"), *_get_ids(folder / "mlc-chat-config.json")]
    ends.append(backend.token_to_id(special.get("eos_token", "")))
    source = _load_template(folder, config)
    end_tokens = frozenset(end for end in ends if end is not None)
    return Tokenizer(
        _show(backend, marks, end_tokens),
        end_tokens=end_tokens,
        template=None if source is None else ChatTemplate(source, special),
    )


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """What is in tokenizer.json. It takes a while, and does not hold Python's lock. Raises PackageInvalid."""
    path = folder / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for everything
        raise PackageInvalid(
            f"{path}: cannot read the tokenizer: {error}", hint="build the package again: doit build model=..."
        ) from error


def _show(backend: tokenizers.Tokenizer, marks: str, end_tokens: frozenset[int]) -> tokenizers.Tokenizer:
    """The same tokenizer with the control tokens in `marks` as text, but for those that end a reply."""
    added = backend.get_added_tokens_decoder()
    shown = {i for i, token in added.items() if token.special and token.content in marks and i not in end_tokens}
    if not shown:
        return backend
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["id"] not in shown
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _load_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja comes first, as in transformers; of several named templates the one called default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _get_ids(path: Path) -> list[int]:
    """`eos_token_id` of a configuration file: one, several or none."""
    value = _load_json(path).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def _get_text(token: Any) -> str | None:
    """The text of a special token, which may be written as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _load_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageInvalid(
            f"{path}: cannot be read: {error}", hint="build the package again: doit build model=..."
        ) from error
    return value if isinstance(value, dict) else {}
