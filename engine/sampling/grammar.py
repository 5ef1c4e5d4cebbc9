"""Holds a reply to a grammar: before each draw, the tokens that cannot continue it get a logit of -infinity.

    compiler = GrammarCompiler(tokenizer)                      once per tokenizer
    grammar = compiler.compile(make_json_grammar(schema))      on the caller's thread: it may take a while
    SamplingParams(grammar=grammar)                            the engine starts a Constraint for each sequence

The work is done by llguidance, a wheel of 4 MB. The better known xgrammar needs torch, triton and transformers to be
installed wherever it runs, which is too much to ask of somebody who only wants to serve a model.

What cannot be compiled is an InvalidRequest, a schema keyword that is not implemented included: a reply is never
freer than was asked for. Work is bounded by llguidance's own counts (LIMITS) rather than by a clock, since a thread
cannot be stopped: the worst schemas of 64 KiB that we know take 0.5 s, a common one 1 ms. One is compiled at a time.
It is imported with the first grammar, so that nobody waits for it at the start.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine.text.tokenizer import Tokenizer

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**53 - 1  # llguidance reads numbers as doubles
CACHED = 128  # grammars, good and bad
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# JSON as json.dumps writes it. Free white space would let a model write nothing but white space.
SPACING: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A compiled grammar; immutable, may be shared by any number of requests."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> Constraint:
        """The constraint of one reply; takes microseconds."""
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """How far one reply has come in its grammar. Belongs to one sequence."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """The reply is complete, and no token can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of logits [vocab] with -infinity for every token that cannot come next.

        Raises InvalidRequest when the grammar has become too ambiguous to follow.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        allowed = np.zeros(len(logits), np.bool_)  # a model may have more logits than its tokenizer has tokens
        count = min(len(bits), len(logits))
        allowed[:count] = bits[:count]
        return np.where(allowed, logits, np.float32(-np.inf))

    def fork(self) -> Constraint:
        """A copy that goes its own way from here; takes microseconds."""
        return Constraint(self._matcher.deep_copy())

    def accept(self, token: int) -> None:
        """The reply goes on with `token`, an end token included."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(
                "the reply's grammar became too complex while it was written",
                hint="use a simpler schema or grammar",
                code="grammar_too_complex",
            )


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest. Callable from any thread.

    `pool`: a thread of its own for who must not wait, so that only those who want a grammar wait for each other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._source = tokenizer
        self._tokenizer: LLTokenizer | None = None  # takes a while for a large vocabulary, so only when needed
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Grammar | str] = OrderedDict()
        self._watchers: list[Callable[[float, bool], None]] = []
        self.pool = ThreadPoolExecutor(1, "grammars")

    def watch(self, watcher: Callable[[float, bool], None]) -> None:
        """From now on tell `watcher` of each compilation: its seconds, and whether it succeeded."""
        self._watchers.append(watcher)

    def compile(self, text: str, *, param: str = "response_format") -> Grammar:
        """The grammar of `text`, from one of the make_ functions or in llguidance's dialect of Lark.

        Raises InvalidRequest, which names `param`, when it is too large or means nothing.
        """
        if len(text) > 4 * MAX_BYTES:
            raise _refuse("it is too large", param)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                start = time.monotonic()
                self._cache[key] = found = self._compile(text)
                for watcher in self._watchers:
                    watcher(time.monotonic() - start, isinstance(found, Grammar))
            self._cache.move_to_end(key)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        if isinstance(found, str):
            raise _refuse(found, param)
        return found

    def _compile(self, text: str) -> Grammar | str:
        """The grammar, or what is wrong with it."""
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = make_backend(self._source)
        try:
            matcher = LLMatcher(self._tokenizer, text, limits=LLParserLimits(**LIMITS), log_level=0)
            if not matcher.is_error():
                first = matcher.deep_copy()  # some grammars fail only at their first step
                first.compute_bitmask()
                return first.get_error() if first.is_error() else Grammar(matcher)
        except (ValueError, UnicodeError) as error:
            return str(error)
        return matcher.get_error() or "it does not compile"


def make_backend(tokenizer: Tokenizer) -> LLTokenizer:
    """llguidance's view of a tokenizer.

    Built by hand, because llguidance takes every added token for a control token. Those of a tool call, such as
    <tool_call>, are text: they are drawn as one token and the grammar reads them as characters.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    backend = tokenizer.backend
    plain = LLTokenizer(backend.to_str(), slices=[])
    added = backend.get_added_tokens_decoder()
    tokens = [plain.decode_bytes([token]) for token in range(plain.vocab_size)]
    for token, known in added.items():
        tokens[token] = known.content.encode()
    special = {token for token, known in added.items() if known.special} | tokenizer.end_tokens
    ends = sorted(tokenizer.end_tokens) or [plain.eos_token]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    view = _View(encode, tokens=tokens, special_token_ids=sorted(special), eos_token_id=ends[0], bos_token_id=None)
    return LLTokenizer(TokenizerWrapper(view), eos_token=ends)


class _View(SimpleNamespace):
    """What llguidance's TokenizerWrapper asks for: attributes, and a call that tokenizes."""

    def __init__(self, encode: Any, **fields: Any) -> None:
        super().__init__(**fields)
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = self._encode(text)
        return tokens


def make_json_grammar(schema: Mapping[str, Any] | None = None, *, param: str = "response_format") -> str:
    """Any JSON object, or a value that fits a JSON schema. Raises InvalidRequest for one that is too large or deep."""
    return "start: " + make_json_rule({"type": "object"} if schema is None else schema, param=param)


def make_json_rule(schema: Mapping[str, Any], *, param: str, lenient: bool = False) -> str:
    """As make_json_grammar, as the right side of a rule in Lark. `lenient`: let go of keywords that are not known."""
    check_schema(schema, param)
    text = json.dumps({**schema, "x-guidance": {**SPACING, "lenient": lenient}})
    if len(text) > MAX_BYTES:
        raise _refuse(f"its schema is longer than {MAX_BYTES} bytes", param)
    return f"%json {text}"


def make_regex_grammar(pattern: str, *, param: str) -> str:
    """Text that matches a regular expression as a whole; look-around and back references are refused.

    The classes \\d, \\w and \\s are those of ASCII, as in JSON schemas: programs read what they match.
    """
    from llguidance import LLMatcher, regex_to_lark

    _check_size(pattern, param)
    try:
        return LLMatcher.grammar_from_regex(regex_to_lark(pattern, "dws").replace("\\/", "/"))
    except UnicodeError as error:
        raise _refuse("it holds half of a surrogate pair, which is no character", param) from error


def make_choice_grammar(choices: Sequence[str], *, param: str) -> str:
    """One of some texts."""
    if not choices or not all(choices):
        raise _refuse("a choice needs at least one text, and none may be empty", param)
    _check_size("".join(choices), param)
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def make_ebnf_grammar(text: str, *, param: str) -> str:
    """A grammar in llama.cpp's GBNF (`root ::= ...`) or in Lark (`start: ...`)."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    _check_size(text, param)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the converter raises whatever its own parser stumbles over
        raise _refuse(str(error), param) from error


def make_tags_grammar(
    tags: Sequence[tuple[str, Mapping[str, Any], str]], triggers: Sequence[str], *, param: str
) -> str:
    """Free text in which each of `triggers` begins a tag: (begin, schema of what is in it, end), as often as it likes.

    The `begin` of a tag starts with one of the triggers. Raises InvalidRequest.
    """
    if not tags or not all(triggers):
        raise _refuse("structural tags need at least one structure, and triggers that are not empty", param)
    _check_size("".join([*triggers, *(begin + end for begin, _, end in tags)]), param)
    bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    rules = []
    for index, (begin, schema, end) in enumerate(tags):
        trigger = max((text for text in bodies if begin.startswith(text)), key=len, default=None)
        if trigger is None:
            raise _refuse(f"no trigger is the beginning of the structure {begin!r}", param)
        rest = (json.dumps(text) if text else "" for text in (begin.removeprefix(trigger), end))
        bodies[trigger].append(f" schema_{index} ".join(rest))
        rules.append(f"schema_{index}: {make_json_rule(schema, param=param)}")
    used = {trigger: options for trigger, options in bodies.items() if options}
    if len(used) < len(bodies):
        raise _refuse("a trigger is the beginning of no structure", param)
    for index, (trigger, options) in enumerate(used.items()):
        rules.append(f"head_{index}[lazy]: TEXT {json.dumps(trigger)}")
        rules.append(f"tag_{index}: head_{index} ({' | '.join(options)})")
    any_tag = " | ".join(f"tag_{index}" for index in range(len(used)))
    return "\n".join([f"start: ({any_tag})* tail", "tail: TEXT", "TEXT: /(.|\\n)*/", *rules])


def add_alternative(grammar: str, other: str) -> str:
    """Either of two grammars, the first of which is Lark that begins with `start: reply`."""
    body = json.loads(other)["grammars"] if other.startswith("{") else [{"lark_grammar": other}]
    either = grammar.replace("start: reply", "start: reply | @other", 1)
    named = [{"name": "either", "lark_grammar": either}, {**body[0], "name": "other"}, *body[1:]]
    return json.dumps({"grammars": named})


def check_schema(schema: Any, param: str) -> None:
    """Raise InvalidRequest for JSON that llguidance would get wrong: nested too deep, or a number it would round."""
    level = [schema]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _get_children(parent)]
        if any(isinstance(child, int) and abs(child) > MAX_INTEGER for child in level):
            raise _refuse(f"it holds an integer beyond {MAX_INTEGER}", param)
        if not level:
            return
    raise _refuse(f"it is nested more than {MAX_DEPTH} deep", param)


def _get_children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_BYTES:
        raise _refuse(f"it is longer than {MAX_BYTES} characters", param)


def _refuse(reason: str, param: str) -> InvalidRequest:
    reason = re.split(r"\n +\d+ \| ", reason)[0]  # what follows is the grammar that we made of it
    reason = " ".join(reason.split()) or "it does not compile"
    reason = reason.removeprefix("at 1(8): failed to compile JSON schema: ")
    return InvalidRequest(
        f"{param} cannot be used to constrain the reply: {reason}",
        hint="change or simplify it; the reply would not be held to it",
        code="invalid_grammar",
        param=param,
    )
