"""Log probabilities in the shape of OpenAI's text completions: parallel lists over the tokens of prompt and reply."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.core import Output, TokenLogprob
from engine.server.completion import LEAST_LOGPROB
from engine.server.protocol.completion import TextLogprobs
from engine.text.token_bytes import TokenBytes


class LogprobWriter:
    """For one text: `write` each Output, with `prompt` (its tokens) at the first if the prompt is echoed."""

    def __init__(self, table: TokenBytes, prompt: Sequence[int] = ()) -> None:
        self._table = table
        self._prompt = prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text so far

    def write(self, output: Output) -> TextLogprobs:
        """What the text has gained. The token that ends a reply is among them, though it has no text."""
        found: list[TokenLogprob | int] = []
        if self._prompt and (output.token_ids or output.finish_reason == "length"):
            found += [self._prompt[0], *output.prompt_logprobs]
            self._prompt = ()
        found += output.logprobs
        found += [] if output.end_logprob is None else [output.end_logprob]
        lists = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in found:
            self._append(lists, entry)
        return lists

    def _append(self, lists: TextLogprobs, entry: TokenLogprob | int) -> None:
        """Add a token; the first of a prompt has no probability, and is given as its id."""
        token = entry if isinstance(entry, int) else entry.token
        data = self._table.get(token)
        lists.tokens.append(make_name(data))
        lists.text_offset.append(self._offset)
        if isinstance(entry, int):
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
        else:
            lists.token_logprobs.append(max(LEAST_LOGPROB, entry.logprob))
            likely = {make_name(t.data): max(LEAST_LOGPROB, t.logprob) for t in reversed((*entry.top, entry))}
            lists.top_logprobs.append(likely)
        if self._table.count_shown(token):
            self._offset += len(self._decoder.decode(data))


def make_name(data: bytes) -> str:
    """A token as text; one that is no whole text is named by its bytes, as OpenAI does, so that names differ."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
