"""What a request must be before it may reach the loop: checked on the caller's thread, so that the loop need not."""

from __future__ import annotations

import math
from collections.abc import Collection

from engine.core import Limits, Request, SamplingParams
from engine.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_PRIORITY = 1000
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_LOGPROBS = 20


def check_request(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest, with the name of the parameter at fault, for what the engine could never do."""
    _check_prompt(request, limits)
    _check_params(request.params, limits)
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        hint = f"it must be between -{MAX_PRIORITY} and {MAX_PRIORITY}; smaller runs sooner"
        raise InvalidRequest(f"priority is {request.priority}", hint=hint, param="priority")
    if request.deadline is not None and not request.arrival < request.deadline < math.inf:
        timeout = request.deadline - request.arrival
        raise InvalidRequest(f"timeout is {timeout:g}", hint="it must be seconds, more than 0", param="timeout")


def get_max_tokens(request: Request, limits: Limits) -> int:
    """How many tokens the reply may have: what was asked for, clipped to what the context holds after the prompt."""
    room = limits.max_length - len(request.prompt_tokens)
    return room if request.params.max_tokens is None else min(request.params.max_tokens, room)


def _check_prompt(request: Request, limits: Limits) -> None:
    tokens, embeds = request.prompt_tokens, request.pooling is not None
    if embeds and not limits.hidden_size:
        raise InvalidRequest(
            "this package makes no embeddings: its library has no function for hidden states",
            hint="build it again, for a CPU",
            code="unsupported_value",
            param="model",
        )
    if embeds and len(tokens) > limits.max_length:
        raise InvalidRequest(
            f"the context holds {limits.max_length} tokens, and the input has {len(tokens)}",
            hint="shorten or split it",
            code="context_length_exceeded",
            param="input",
        )
    if not tokens:
        raise InvalidRequest("the prompt is empty: it has no tokens", hint="send at least one token", param="prompt")
    if len(tokens) >= limits.max_length and not embeds:
        raise InvalidRequest(
            f"the context holds {limits.max_length} tokens, and the prompt has {len(tokens)}: no room for a reply",
            hint=f"shorten the prompt to at most {limits.max_length - 1} tokens",
            code="context_length_exceeded",
            param="messages",
        )
    wrong = next((t for t in tokens if not 0 <= t < limits.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"token {wrong} of the prompt is not in the vocabulary of {limits.vocab_size}",
            hint="use this package's own tokenizer",
            param="prompt",
        )


def _check_params(params: SamplingParams, limits: Limits) -> None:
    checks = (
        ("temperature", 0 <= params.temperature <= 2, "between 0 and 2"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 (off) and 1"),
        ("typical_p", 0 < params.typical_p <= 1, "above 0 and at most 1 (off)"),
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "between 0.01 and 100; 1 is off"),
        ("presence_penalty", -2 <= params.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", -2 <= params.frequency_penalty <= 2, "between -2 and 2"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            params.prompt_logprobs is None or 0 <= params.prompt_logprobs <= MAX_LOGPROBS,
            f"0 to {MAX_LOGPROBS}",
        ),
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 0, "0 or more"),
        ("seed", params.seed is None or -(2**63) <= params.seed < 2**64, "a 64-bit integer"),
    )
    for name, ok, wanted in checks:
        value = getattr(params, name)
        if not ok or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidRequest(f"{name} is {value}", hint=f"it must be {wanted}", param=name)
    if len(params.stop) > MAX_STOPS or any(not 1 <= len(s) <= MAX_STOP_LENGTH for s in params.stop):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
            hint="send fewer or shorter ones",
            param="stop",
        )
    _check_tokens("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKENS, limits)
    _check_tokens("logit_bias", params.logit_bias, MAX_BIASES, limits)
    if any(not -100 <= bias <= 100 for bias in params.logit_bias.values()):
        raise InvalidRequest(
            "logit_bias holds a bias that is out of range", hint="it must be between -100 and 100", param="logit_bias"
        )


def _check_tokens(name: str, tokens: Collection[int], most: int, limits: Limits) -> None:
    if len(tokens) > most:
        raise InvalidRequest(f"{name} holds {len(tokens)} tokens", hint=f"it takes at most {most}", param=name)
    if any(not 0 <= t < limits.vocab_size for t in tokens):
        raise InvalidRequest(
            f"{name} holds a token outside of the vocabulary",
            hint=f"it must be 0 to {limits.vocab_size - 1}",
            param=name,
        )
