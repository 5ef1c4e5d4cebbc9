"""MLC's `conv_template` from a tokenizer's Jinja chat template, found out by rendering probes and cutting them up.

MLC has no Jinja: a conversation is system text + (role header + content + separator) per message. `make_conversation`
renders short conversations with marked contents, reads headers and separators off the result, renders the same
conversations by MLC's rule and reports where the two differ. What MLC's schema cannot say at all: tool definitions,
text that depends on the position of a message or on the date, history edited by the template.
Our own engine does not use this: it renders the Jinja template itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
SYSTEM, USER, ANSWER, AGAIN = "(the system text)", "(first question)", "(first answer)", "(second question)"
PROBES: dict[str, list[Message]] = {
    "a question": [{"role": "user", "content": USER}],
    "a question after a system message": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}],
    "a second question": [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": AGAIN},
    ],
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """`template` in MLC's schema; `differences`: conversations that MLC's rule renders in another way than Jinja."""

    template: dict[str, Any]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's Jinja template with the texts of its special tokens."""

    source: str
    bos: str
    eos: str

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """The conversation as text; `prompt` adds the header of the answer to come. Raises jinja2's errors."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        template = environment.from_string(self.source)
        return template.render(
            messages=list(messages), add_generation_prompt=prompt, bos_token=self.bos, eos_token=self.eos, tools=None
        )


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of the tokenizer files in `folder` (chat_template.jinja, else tokenizer_config.json), if any."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    separate = folder / "chat_template.jinja"
    source = separate.read_text(encoding="utf-8") if separate.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates; the one for chatting is called "default"
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    if not source:
        return None
    return ChatTemplate(source, _get_token_text(config.get("bos_token")), _get_token_text(config.get("eos_token")))


def make_conversation(
    name: str, chat: ChatTemplate | None, *, bos_id: int | None, stop_ids: Sequence[int], stop: Sequence[str]
) -> Conversation:
    """MLC's template for `chat`. Without a usable one: bare text, and the difference that says so."""
    base: dict[str, Any] = {
        "name": name,
        "system_template": "{system_message}",
        "system_message": "",
        "add_role_after_system_message": True,
        "roles": {"user": "", "assistant": "", "tool": ""},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
        "messages": [],
        "seps": ["\n"],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": list(stop),
        "stop_token_ids": list(stop_ids),
        "function_string": "",
        "use_function_calling": False,
    }
    if chat is None:
        return Conversation(base, ("the model has no chat template: messages are joined as bare text",))
    try:
        parts = _find_parts(chat)
    except Exception as error:  # a template is a foreign program: anything may come out of it
        return Conversation(base, (f"the chat template does not fit MLC's schema: {error}",))
    if chat.bos and bos_id is not None and parts["system_template"].startswith(chat.bos):
        parts["system_template"] = parts["system_template"][len(chat.bos) :]
        base["system_prefix_token_ids"] = [bos_id]
    template = base | parts
    return Conversation(template, tuple(_find_differences(chat, template)))


def render_like_mlc(template: dict[str, Any], messages: Sequence[Message], bos: str = "") -> str:
    """The prompt that MLC makes of `messages` and the empty answer that follows; `bos` is the text of the prefix id."""
    system = next((m["content"] for m in messages if m["role"] == "system"), template["system_message"])
    text: str = bos if template.get("system_prefix_token_ids") else ""
    text += template["system_template"].replace("{system_message}", system)
    separators = {"user": template["seps"][0], "assistant": template["seps"][-1]}
    for message in messages:
        if (role := message["role"]) != "system":
            content = template["role_templates"][role].replace(f"{{{role}_message}}", message["content"])
            text += template["roles"][role] + template["role_content_sep"] + content + separators[role]
    text += template["roles"]["assistant"] + template["role_empty_sep"]
    return text


def _find_parts(chat: ChatTemplate) -> dict[str, Any]:
    """Headers and separators. Raises ValueError where the marked contents do not come out whole and in order."""
    question, system, again = (PROBES[name] for name in PROBES)
    before, after = _cut(chat.render(question, False), USER)
    _, answer_start = _cut(chat.render(question, True), USER)
    answer_header = _strip_start(answer_start, after)
    _, rest = _cut(chat.render(again[:2], False), USER)
    middle, answer_end = _cut(rest, ANSWER)
    _, rest = _cut(chat.render(again, False), ANSWER)
    between, _ = _cut(rest, AGAIN)
    user_header = _strip_start(between, answer_end)
    opening, rest = _cut(chat.render(system, False), SYSTEM)
    closing, _ = _cut(rest, USER)
    closing = _strip_end(closing, user_header)
    default = _strip_end(before, user_header)
    message = default[len(opening) : len(default) - len(closing)]
    role, content_sep, empty_sep = _split_header(_strip_start(middle, after), answer_header)
    user = _strip_end(user_header, content_sep)
    return {
        "system_template": f"{opening}{{system_message}}{closing}",
        "system_message": message if opening + message + closing == default else "",
        "roles": {"user": user, "assistant": role, "tool": user},
        "seps": [after, answer_end],
        "role_content_sep": content_sep,
        "role_empty_sep": empty_sep,
    }


def _split_header(before_content: str, before_answer: str) -> tuple[str, str, str]:
    """Assistant role, separator before a given content, separator before an answer to come.

    A newline that ends the header becomes the separator, as in MLC's own templates.
    """
    role = before_content.rstrip("\n")
    return role, before_content[len(role) :], _strip_start(before_answer, role)


def _find_differences(chat: ChatTemplate, template: dict[str, Any]) -> list[str]:
    found = []
    for name, messages in PROBES.items():
        if render_like_mlc(template, messages, chat.bos) != chat.render(messages, True):
            found.append(f"{name} is rendered in another way by MLC than by the chat template")
    return [*found, "tool definitions and tool results are not described"]


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"it drops or changes the text {mark!r}")
    return before, after


def _strip_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r} was expected to begin with {start!r}")
    return text[len(start) :]


def _strip_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r} was expected to end with {end!r}")
    return text[: len(text) - len(end)]


def _get_token_text(token: Any) -> str:
    """tokenizer_config.json holds a special token as text, as {"content": text}, or not at all."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
