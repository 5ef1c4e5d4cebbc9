"""Fields that ask for what this server cannot do: refused, so that nothing that was asked for is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Known fields that ask for what this server cannot do, with the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "chat_template": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    # Other servers': what would change the reply, so that leaving it out in silence would be a lie.
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "ebnf": ("",),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "n_predict": (-1,),
    "regex": ("",),
    "repeat_penalty": (1,),  # repetition_penalty is the name here
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
# Fields of a chat that may come by another protocol, which does not have them, and what asks for nothing there.
FREE = ("stream_options", "timings")
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({},),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "top_k": (0,),
    "top_logprobs": (0,),
    "typical_p": (1,),
}


def find_asking(given: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> str | None:
    """The name of a field of `harmless` with none of the values that it has there, nor null; None if there is none."""
    return next((name for name, value in given.items() if name in harmless and _asks(value, harmless[name])), None)


def find_foreign(extra: Mapping[str, Any], chat: Iterable[str]) -> str | None:
    """Of fields that a protocol does not have, the name of one that would mean something in a chat, with its fields."""
    return find_asking(extra, {name: NOTHING.get(name, ()) for name in chat if name not in FREE} | dict(UNSUPPORTED))


def _asks(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether `value` is not one of the harmless ones, where 1 is 1.0 but not true."""
    if value is None:
        return False
    return not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)
