"""The plain data that the parts of the engine hand to each other; numpy is named here but not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from engine.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.sampling.grammar import Grammar

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What an executor can hold and take; fixed when it starts.

    `context_window`: positions of one sequence. `prefill_chunk`: tokens of one batch, over all its sequences.
    `max_batch`: sequences of one batch. The KV cache has `num_pages` pages of `page_size` positions, for all sequences
    together. `hidden_size`: numbers of an embedding; 0 where the library makes none. `picks_tokens`: whether it picks
    tokens.
    """

    context_window: int
    prefill_chunk: int
    max_batch: int
    page_size: int
    num_pages: int
    vocab_size: int
    hidden_size: int = 0
    picks_tokens: bool = False

    @property
    def max_length(self) -> int:
        """Tokens, prompt and reply, that one sequence can reach when it has the whole cache to itself."""
        return min(self.context_window, self.num_pages * self.page_size)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens and when to end. Checked by `engine.engine.check_request`, not here.

    temperature       0 = the likeliest token, always; ties go to the smaller id
    top_p             keep the likeliest tokens until their probabilities sum to this; 1 = keep all
    top_k             keep this many of the likeliest tokens; 0 = keep all
    min_p             keep tokens of at least this times the likeliest one's probability; 0 = keep all
    typical_p         keep the tokens nearest to the expected surprise until they sum to this; 1 = keep all
    repetition_penalty  above 1 makes every token of prompt and reply less likely; 1 = off
    presence_penalty    taken from the logits of tokens that the reply has
    frequency_penalty   the same, once for each time
    logit_bias        token id -> added to its logit; -100 bans it, 100 all but forces it
    logprobs          report the log probability of each token, and of so many of the likeliest; None = do not
    prompt_logprobs   the same for the tokens of the prompt, which then all run, whatever the prefix cache has
    seed              same seed, package and request = same tokens, whatever else is running; None = from the system
    max_tokens        end with "length" after so many tokens; 0 = the prompt only, None = what the context still holds
    stop              end with "stop" before any of these strings appears in the text
    stop_token_ids    end with "stop" at these tokens, besides those of the model
    ignore_eos        go on after the model's own end tokens
    grammar           what the reply must be, and where it ends; from engine.sampling.grammar
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Draw(NamedTuple):
    """One draw as an executor makes it: SamplingParams of the same names, and how far along what is kept it lies.

    `temperature` is above 0, `uniform` in [0, 1). With `top_k` 1 it is the first of the largest logits.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `arrival` and `deadline` are in seconds of `time.monotonic`.

    `priority`: smaller runs sooner, and takes the place of a running one with a greater number; equal ones run in
    order of arrival. `deadline`: a reply that has not ended by then ends with DeadlineExceeded. `pooling`: no reply
    is wanted but the prompt's embedding, of its last token or of all, which then run whatever the prefix cache has.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    arrival: float
    priority: int = 0
    deadline: float | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of the executor: some next tokens of some sequences. All arrays are int32.

    tokens      [n]     token ids; the tokens of one sequence are adjacent and in order
    positions   [n]     position of each token in its sequence: its key and value are written there
    rows        [n]     row of `page_table`, i.e. which sequence; starts at 0, never falls, skips none
    page_table  [s, p]  page of positions [i * page_size, (i + 1) * page_size) of each sequence; unused ends hold 0
    logit_rows  [b]     indices into `tokens`, rising: those whose next-token logits are wanted; b may be 0

    A token sees the positions of its own sequence up to its own, those of earlier batches included.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    rows: NDArray[np.int32]
    page_table: NDArray[np.int32]
    logit_rows: NDArray[np.int32]


@dataclass(slots=True)  # a frozen one takes three times as long to make, and there is one for each token
class Usage:
    """What one request took; never changed. Times in seconds; None until there is something to measure.

    `cached_tokens`: those of the prompt whose keys and values were in the prefix cache, so that they did not run.
    `guessed_tokens` were guessed ahead; of these, `right_tokens` are in the reply, each of which saved a step.
    `queued`: arrival to first computed. `ttft`: arrival to first token. `decoding`: first to latest token.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    queued: float | None = None
    ttft: float | None = None
    decoding: float | None = None
    cached_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and reply together."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None with fewer than two."""
        return (self.completion_tokens - 1) / self.decoding if self.decoding else None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes `data` (part of a character, perhaps), its natural log probability, and the likeliest ones."""

    token: int
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; what is no UTF-8 becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")


@dataclass(slots=True)  # as Usage
class Output:
    """What one request has gained since its previous Output; joined together they are the reply. Never changed.

    `text` may be empty while a character or a possible stop string is incomplete. `token_ids` are all sampled tokens,
    the one that ended the reply included. `usage` is the state so far, not a difference. The last Output of a request,
    and only that, has a `finish_reason`; `error` is set when that is "error". `logprobs`, if they were asked for, are
    of the tokens whose text is out: without end tokens and stop strings. `prompt_logprobs` come with the first Output,
    one for each token of the prompt after its first, and `end_logprob`, of an end token, with the last.
    `embedding` comes with the only Output of a request that asked for it: float32 [hidden], of length 1.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    error: EngineError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    end_logprob: TokenLogprob | None = None
    embedding: NDArray[np.float32] | None = None


def join_outputs(first: Output, second: Output) -> Output:
    """One Output that says what two consecutive ones of a request say."""
    return Output(
        first.request_id,
        first.text + second.text,
        first.token_ids + second.token_ids,
        second.usage,
        second.finish_reason,
        second.error,
        first.logprobs + second.logprobs,
        first.prompt_logprobs + second.prompt_logprobs,
        second.end_logprob,
        second.embedding,
    )


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine at one moment, and its counters since start.

    `free_pages`: pages that no sequence has; `cached_pages` of them hold what the prefix cache remembers. Of all
    `prompt_tokens`, `cached_tokens` were found there. `evictions`: pages that it had to forget.
    `guesses`: how often tokens were guessed ahead; of all `guessed_tokens`, `right_tokens` were right, each of which
    saved a step of its sequence. `model_seconds`: time in the executor; the rest of the time somebody else takes.
    """

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    prompt_tokens: int
    completion_tokens: int
    preemptions: int
    cached_pages: int
    cached_tokens: int
    evictions: int
    guesses: int
    guessed_tokens: int
    right_tokens: int
    model_seconds: float
