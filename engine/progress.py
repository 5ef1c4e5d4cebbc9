"""One request under way: turns its tokens into Outputs, decides when it ends, and keeps its times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core import Draw, FinishReason, Output, Request, SamplingParams, TokenLogprob, Usage
from engine.errors import EngineError, InvalidRequest
from engine.pooling import Pool
from engine.sampling.grammar import Constraint
from engine.sampling.logprobs import LogprobQueue, make_logprob
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import Uniforms, is_drawn, make_draw, make_uniforms, pick_token
from engine.scheduler.policy import Sequence
from engine.text.stream import TextStream
from engine.text.tokenizer import Tokenizer


class Progress:
    """`max_tokens` is already clipped to the context. All times are in seconds of the engine's clock."""

    def __init__(self, request: Request, tokenizer: Tokenizer, max_tokens: int) -> None:
        params = request.params
        self.request = request
        scored = 0 if params.prompt_logprobs is None else len(request.prompt_tokens) - 1
        self.sequence = Sequence(request.request_id, request.prompt_tokens, request.priority, scored)
        self._pool = None if request.pooling is None else Pool(request.pooling)
        if self._pool is not None:
            self.sequence.pooled, self.sequence.whole = True, request.pooling == "mean"
        self._uniforms = make_uniforms(params)
        self.is_drawn = is_drawn(params)
        self._penalties = Penalties(params, request.prompt_tokens)
        self._constraint = None if params.grammar is None else params.grammar.start()
        self._stream = TextStream(tokenizer.make_detokenizer(), params.stop)
        self._token_bytes = tokenizer.token_bytes
        self._logprob: TokenLogprob | None = None  # of the token that is about to be accepted
        self._logprobs = LogprobQueue()
        self._prompt_logprobs: list[TokenLogprob] = []  # those that no Output has had
        self._scored = 0  # tokens of the prompt after which a log probability has been kept
        self._end_tokens = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._end_tokens |= tokenizer.end_tokens
        self._max_tokens = max_tokens
        self._count = 0
        self.guessed = 0  # tokens, by whoever guesses
        self.right = 0
        self._first: float | None = None  # when the first token came
        self._queued: float | None = None  # these as in Usage
        self._ttft: float | None = None
        self._decoding: float | None = None

    @property
    def started(self) -> bool:
        """Some of the prompt has run."""
        return self._queued is not None

    @property
    def room(self) -> int:
        """Tokens that may still come after the next one."""
        return max(0, self._max_tokens - self._count - 1)

    @property
    def wants_tokens(self) -> bool:
        """A reply is wanted, not only that the prompt runs."""
        return self._max_tokens > 0

    @property
    def wants_logprobs(self) -> bool:
        """Of the tokens of the reply."""
        return self.request.params.logprobs is not None

    def look_ahead(self) -> Outlook:
        """What would pick the next tokens if some model's logits were ours."""
        constraint = None if self._constraint is None else self._constraint.fork()
        uniforms = self._uniforms.fork()
        return Outlook(self.request.params, self._end_tokens, self._penalties.fork(), constraint, uniforms)

    def start(self, now: float) -> None:
        """The first tokens are about to run."""
        self._queued = now - self.request.arrival

    def draw(self) -> Draw:
        """How an executor is to pick the next token, where `is_drawn`."""
        return make_draw(self.request.params, self._uniforms)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token after logits [vocab], once logit_bias, penalties and grammar have had their say.

        Raises InvalidRequest when the grammar allows none, ValueError for logits that are no use.
        """
        logits = self._penalties.apply(logits)
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        return pick_token(logits, self.request.params, self._uniforms)

    def record(self, logits: NDArray[np.float32], token: int) -> None:
        """Keep the log probability of a token under the model's own logits [vocab]."""
        count = self.request.params.logprobs or 0
        self._logprob = make_logprob(logits, token, count, self._token_bytes.get)

    def score(self, logits: NDArray[np.float32], position: int) -> None:
        """Keep the log probability of the prompt's token after `position`; once, though it may be computed again."""
        count = self.request.params.prompt_logprobs
        if count is not None and position == self._scored:
            token = self.request.prompt_tokens[position + 1]
            self._prompt_logprobs.append(make_logprob(logits, token, count, self._token_bytes.get))
            self._scored += 1

    def pool(self, states: NDArray[np.float32], start: int, *, last: bool, now: float) -> Output | None:
        """Take hidden states [n, hidden] of the tokens from `start` on; after the last ones the Output that ends this.

        ValueError when they cannot be pooled.
        """
        assert self._pool is not None
        self._pool.add(states, start)
        if not last:
            return None
        self._ttft = now - self.request.arrival
        embedding = self._pool.finish()
        return Output(self.request.request_id, "", (), self._make_usage(), "stop", embedding=embedding)

    def accept(self, token: int, now: float) -> Output:
        """Take the next token; the Output says whether it was the last."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._count += 1
        if self._first is None:
            self._first, self._ttft = now, now - self.request.arrival
        else:
            self._decoding = now - self._first
        text = ""
        reason: FinishReason | None = None
        if token in self._end_tokens:
            reason = "stop"
        else:
            self.sequence.tokens.append(token)
            self._penalties.accept(token)
            if self._logprob is not None:
                self._logprobs.push(self._logprob, self._token_bytes.count_shown(token))
            text = self._stream.push(token)
            if self._stream.stopped or (self._constraint is not None and self._constraint.finished):
                reason = "stop"
            elif self._count == self._max_tokens:
                reason = "length"
        if reason is not None and not self._stream.stopped:
            text += self._stream.finish()
        usage = self._make_usage()
        if self._logprob is None and not self._prompt_logprobs:  # nearly always
            return Output(self.request.request_id, text, (token,), usage, reason)
        logprobs = self._logprobs.pop(text, last=reason is not None and not self._stream.stopped)
        prompt = tuple(self._prompt_logprobs)
        self._prompt_logprobs.clear()
        end = self._logprob if token in self._end_tokens else None
        return Output(self.request.request_id, text, (token,), usage, reason, None, logprobs, prompt, end)

    def finish_prompt(self) -> Output:
        """The only Output of a request that wants no tokens: its prompt has run."""
        prompt = tuple(self._prompt_logprobs)
        return Output(self.request.request_id, "", (), self._make_usage(), "length", prompt_logprobs=prompt)

    def end(self, reason: FinishReason, error: EngineError | None = None) -> Output:
        """The last Output of a request that ends without another token."""
        text = self._stream.finish() if reason == "abort" else ""
        logprobs = self._logprobs.pop(text, last=True)
        return Output(self.request.request_id, text, (), self._make_usage(), reason, error, logprobs)

    def _make_usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_tokens),
            completion_tokens=self._count,
            queued=self._queued,
            ttft=self._ttft,
            decoding=self._decoding,
            cached_tokens=self.sequence.cached or 0,
            guessed_tokens=self.guessed,
            right_tokens=self.right,
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """A copy of all that decides which token follows some logits; what it picks changes nothing but itself."""

    params: SamplingParams
    end_tokens: frozenset[int]
    penalties: Penalties
    constraint: Constraint | None
    uniforms: Uniforms

    def pick(self, logits: NDArray[np.float32]) -> int | None:
        """The next token after logits [vocab]; None where the reply ends or no token can be had of them."""
        try:
            logits = self.penalties.apply(logits)
            if self.constraint is not None:
                if self.constraint.finished:
                    return None
                logits = self.constraint.mask(logits)
            token = pick_token(logits, self.params, self.uniforms)
            if token in self.end_tokens:
                return None
            self.penalties.accept(token)
            if self.constraint is not None:
                self.constraint.accept(token)
        except (InvalidRequest, ValueError):  # logits that are not numbers; a grammar that is too complex
            return None
        return token
