"""One request under way: turns its tokens into Outputs, decides when it ends, and keeps its times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core import FinishReason, Output, Request, SamplingParams, TokenLogprob, Usage
from engine.errors import EngineError, InvalidRequest
from engine.pooling import Pool
from engine.sampling.grammar import Constraint
from engine.sampling.logprobs import LogprobQueue, make_logprob
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import fork_generator, make_generator, pick_token
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
        self.generator = make_generator(params)
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
        self._started: float | None = None
        self._first: float | None = None
        self._latest: float | None = None

    @property
    def started(self) -> bool:
        """Some of the prompt has run."""
        return self._started is not None

    @property
    def room(self) -> int:
        """Tokens that may still come after the next one."""
        return max(0, self._max_tokens - self._count - 1)

    @property
    def wants_tokens(self) -> bool:
        """A reply is wanted, not only that the prompt runs."""
        return self._max_tokens > 0

    def look_ahead(self) -> Outlook:
        """What would pick the next tokens if some model's logits were ours."""
        constraint = None if self._constraint is None else self._constraint.fork()
        generator = fork_generator(self.generator)
        return Outlook(self.request.params, self._end_tokens, self._penalties.fork(), constraint, generator)

    def start(self, now: float) -> None:
        """The first tokens are about to run."""
        self._started = now

    def constrain(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [vocab] after logit_bias and penalties, without the tokens that the request's grammar forbids here.

        Raises InvalidRequest when the grammar allows none.
        """
        logits = self._penalties.apply(logits)
        return logits if self._constraint is None else self._constraint.mask(logits)

    def record(self, logits: NDArray[np.float32], token: int) -> None:
        """Keep the log probability of a token under the model's own logits [vocab], if that was asked for."""
        count = self.request.params.logprobs
        if count is not None:
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
        self._first = self._latest = now
        embedding = self._pool.finish()
        return Output(self.request.request_id, "", (), self._make_usage(), "stop", embedding=embedding)

    def accept(self, token: int, now: float) -> Output:
        """Take the next token; the Output says whether it was the last."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._count += 1
        self._first = now if self._first is None else self._first
        self._latest = now
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
        logprobs = self._logprobs.pop(text, last=reason is not None and not self._stream.stopped)
        prompt = tuple(self._prompt_logprobs)
        self._prompt_logprobs.clear()
        usage = self._make_usage()
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
        def since(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else end - start

        arrival = self.request.arrival
        return Usage(
            prompt_tokens=len(self.request.prompt_tokens),
            completion_tokens=self._count,
            queued=since(arrival, self._started),
            ttft=since(arrival, self._first),
            decoding=since(self._first, self._latest) if self._count > 1 else None,
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
    generator: np.random.Generator

    def pick(self, logits: NDArray[np.float32]) -> int | None:
        """The next token after logits [vocab]; None where the reply ends or no token can be had of them."""
        try:
            logits = self.penalties.apply(logits)
            if self.constraint is not None:
                if self.constraint.finished:
                    return None
                logits = self.constraint.mask(logits)
            token = pick_token(logits, self.params, self.generator)
            if token in self.end_tokens:
                return None
            self.penalties.accept(token)
            if self.constraint is not None:
                self.constraint.accept(token)
        except (InvalidRequest, ValueError):  # logits that are not numbers; a grammar that is too complex
            return None
        return token
