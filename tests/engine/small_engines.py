"""For the tests in this folder: a byte-level tokenizer made on the spot, requests, engines over the fake executor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.core import Limits, Output, Request, SamplingParams, join_outputs
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor, Model, make_hash_model, make_scripted_model
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer

END = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
LIMITS = Limits(
    context_window=128, prefill_chunk=24, max_batch=4, page_size=16, num_pages=20, vocab_size=258, hidden_size=8
)


def make_tokenizer() -> Tokenizer:
    """One token per byte (ids in the order of the byte values), then <end> = 256 and <pad> = 257, both special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's table leaves as they are
    table = {b: chr(b) for b in keep}
    table |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in table)}
    assert sorted(table.values()) == alphabet
    backend = Backend(models.BPE({table[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<pad>", special=True)])
    return Tokenizer(backend, end_tokens=frozenset({END}), template=ChatTemplate(TEMPLATE, {}))


TOKENIZER = make_tokenizer()


def make_request(name: str, prompt: Sequence[int] | str, **params: object) -> Request:
    tokens = prompt.encode() if isinstance(prompt, str) else prompt
    return Request(name, tuple(tokens), SamplingParams(**params), time.monotonic())  # type: ignore[arg-type]


def join_by_request(outputs: Iterable[Output]) -> dict[str, Output]:
    whole: dict[str, Output] = {}
    for output in outputs:
        name = output.request_id
        assert name not in whole or whole[name].finish_reason is None, f"{name} goes on after its end"
        whole[name] = join_outputs(whole[name], output) if name in whole else output
    return whole


def run_all(engine: Engine, max_steps: int = 10_000) -> dict[str, Output]:
    """Step until nothing is left; the whole output of each request."""
    outputs: list[Output] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return join_by_request(outputs)
        outputs += engine.step()
    raise AssertionError(f"not done after {max_steps} steps")


def make_ending_model(vocab_size: int, one_in: int = 20) -> Model:
    """The hash language, but END comes now and then."""
    inner = make_hash_model(vocab_size)

    def model(history):
        logits = inner(history)
        logits[END] = 50 if int(history.sum()) % one_in == 0 else -50
        return logits

    return model


def make_engine(limits: Limits = LIMITS, model: Model | None = None) -> Engine:
    return Engine(FakeExecutor(limits, model or make_ending_model(limits.vocab_size)), TOKENIZER)


def make_talking_engine(reply: str, limits: Limits = LIMITS, prompt: str = "") -> Engine:
    """Says `reply` and END after any prompt that ends in `prompt` or, without one, in a newline."""
    script = [((prompt or "\n").encode(), reply.encode())]
    return make_engine(limits, make_scripted_model(limits.vocab_size, script, end_token=END))
