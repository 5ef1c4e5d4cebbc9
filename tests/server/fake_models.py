"""A model that says what it is told, behind a real engine.

The last user message decides:

    slow ...            the words of count() for ever, one every 20 ms
    random              whatever the sampler picks among the letters
    unusable            logits that are not numbers: this request fails
    crash               the executor fails, and the engine with it
    say ...             the rest of the message, as it is
    drawl ...           the same, a word every 20 ms
    prompt              the rendered conversation, as the engine got it; <|im_end|> is <im_end|>, <tool_call> <call>
    anything else       "You said: " and the message
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.core import Limits, SamplingParams
from engine.engine import Engine
from engine.model import LoadedModel
from engine.runtime.fake import FakeExecutor
from engine.text.call_format import load_format
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.thread import EngineThread

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(
    context_window=512, prefill_chunk=128, max_batch=8, page_size=16, num_pages=320, vocab_size=2048, hidden_size=32
)
ASSISTANT = "<|im_start|>assistant\n"
USER = "<|im_start|>user\n"
STEP = 0.02
SLUGGISH = 1.5


class Parrot:
    """A model for FakeExecutor: the logits of the reply's next token stand out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opening = tokenizer.encode(ASSISTANT, add_special_tokens=False)
        self._letters = [tokenizer.encode(c)[0] for c in "abcdefghijklmnopqrstuvwxyz"]
        (self._end,) = tokenizer.encode("<|im_end|>")

    def __call__(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        tokens, width = history.tolist(), len(self._opening)
        starts = (i for i in range(width, len(tokens) + 1) if tokens[i - width : i] == self._opening)
        start = max(starts, default=len(tokens))  # none: this is the beginning of a prompt that is scored
        prompt = self._tokenizer.decode(tokens[:start], skip_special_tokens=False)
        message = prompt.rsplit(USER, 1)[-1].split("<|im_end|>")[0]
        return self._make_logits(message, prompt, len(tokens) - start)

    def _make_logits(self, message: str, prompt: str, said: int) -> NDArray[np.float32]:
        logits = np.full(LIMITS.vocab_size, -30, np.float32)
        if message == "crash":
            raise RuntimeError("the executor of /secret/path has failed")
        if message == "unusable":
            logits[:] = np.nan
        elif message == "random":
            logits[self._letters if said < 12 else self._end] = 30
        else:
            reply = self._tokenizer.encode(self._choose_reply(message, prompt, said))
            logits[reply[said] if said < len(reply) else self._end] = 30
        return logits

    def _choose_reply(self, message: str, prompt: str, said: int) -> str:
        if message.startswith("slow"):
            time.sleep(STEP)
            return " again" * (said + 1) * 2
        if message.startswith(("say ", "drawl ")):
            time.sleep(STEP if message.startswith("drawl") else 0)
            return message.split(" ", 1)[1]
        return (
            prompt.replace("<|", "<").replace("<tool_call>", "<call>")
            if message == "prompt"
            else f"You said: {message}"
        )


def load_fake(
    *,
    name: str = "fake",
    queue_limit: int = 128,
    limits: Limits = LIMITS,
    reasoning: str | None = None,
    tool_format: str = "hermes",
) -> LoadedModel:
    """A loaded model without a package; one that is called sluggish takes its time to load."""

    def make_engine() -> Engine:
        time.sleep(SLUGGISH if name == "sluggish" else 0)
        tokenizer = load_tokenizer(ROOT / "recipes" / "models" / "tiny")
        return Engine(FakeExecutor(limits, Parrot(tokenizer)), tokenizer)

    engine = EngineThread(make_engine, queue_limit=queue_limit)
    return LoadedModel(
        name,
        f"{name}/none/here",
        1_700_000_000,
        engine,
        SamplingParams(temperature=0.0),
        load_format(tool_format),
        reasoning,
        tool_format,
    )
