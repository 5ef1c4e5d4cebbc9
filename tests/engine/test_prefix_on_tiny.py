"""Prefix cache and guessing over real kernels: the same tokens with and without, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_engines import make_request, run_all

from engine.artifact import open_package
from engine.core import Output, SamplingParams
from engine.engine import Engine
from engine.llm import LLM
from engine.runtime.tvm_executor import TvmExecutor
from engine.text.tokenizer import load_tokenizer

TURNS = ("Tell me a story about a red ball and a dog.", "And then?", "Who found it in the end?")


@pytest.fixture(scope="module")
def executor(tiny_package: Path) -> Iterator[TvmExecutor]:
    executor = TvmExecutor(open_package(tiny_package))
    executor.tokenizer = load_tokenizer(tiny_package)
    yield executor
    executor.close()


def make_engine(executor: TvmExecutor, prefix_cache: bool, draft_tokens: int = 0) -> Engine:
    options = {"prefix_cache": prefix_cache, "draft_tokens": draft_tokens, "weigh_guesses": False}
    return Engine(executor, executor.tokenizer, **options)


def talk(engine: Engine, seed: int, others: int = 0) -> list[Output]:
    """The replies of a conversation. Beside every turn run `others`, which begin as it does."""
    messages: list[dict[str, str]] = []
    replies = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        prompt = engine.tokenizer.encode_chat(messages)
        for other in range(others):
            engine.add(make_request(str(other), [*prompt[: 20 + 9 * other], 5 + other], max_tokens=30))
        engine.add(make_request("turn", prompt, temperature=float(seed % 2), seed=seed, max_tokens=40))
        replies.append(run_all(engine)["turn"])
        messages.append({"role": "assistant", "content": replies[-1].text})
    return replies


@pytest.mark.parametrize("seed", range(6))
def test_a_conversation_is_the_same_with_and_without(executor: TvmExecutor, seed: int) -> None:
    wanted = talk(make_engine(executor, prefix_cache=False), seed)
    for others in (0, 3):
        engine = make_engine(executor, prefix_cache=True)
        replies = talk(engine, seed, others)
        assert [r.token_ids for r in replies] == [r.token_ids for r in wanted]
        assert engine.get_stats().free_pages == executor.limits.num_pages
    assert [r.usage.cached_tokens for r in wanted] == [0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_guessing_changes_nothing(executor: TvmExecutor, temperature: float) -> None:
    replies = []
    for draft_tokens in (0, 6):
        engine = make_engine(executor, prefix_cache=True, draft_tokens=draft_tokens)
        for seed, text in enumerate(("Tom has a red ball. ", "One, two, three. ", "The dog and the cat run. ")):
            prompt = engine.tokenizer.encode(text * 6)
            params = {"temperature": temperature, "seed": seed, "max_tokens": 60, "ignore_eos": True}
            engine.add(make_request(str(seed), prompt, **params))
        replies.append({name: output.token_ids for name, output in run_all(engine).items()})
        assert (engine.get_stats().right_tokens > 10) == (draft_tokens > 0)
    assert replies[0] == replies[1]


def test_a_turn_computes_only_what_is_new(executor: TvmExecutor) -> None:
    engine = make_engine(executor, prefix_cache=True)
    first, *later = talk(engine, seed=0)
    assert first.usage.cached_tokens == 0
    history = first.usage.total_tokens
    for reply in later:  # all of the earlier turns but for less than one page, and the token that ended them
        assert history - 17 <= reply.usage.cached_tokens <= history
        history = reply.usage.total_tokens


@pytest.mark.parametrize("quantization", ["q4f16_1", "q4f16_1_kv8"])
def test_what_is_kept_on_disk_is_of_use_later(
    build_embedded: Callable[..., Path], tmp_path: Path, quantization: str
) -> None:
    package = build_embedded("tiny", quantization)
    messages = [{"role": "user", "content": " ".join(TURNS)}]
    replies = []
    for _ in range(2):
        with LLM(package, kv_tokens=1024, cache_file=tmp_path / "cache") as llm:
            replies.append(llm.chat(messages, SamplingParams(temperature=0, max_tokens=30)))
    assert replies[0].token_ids == replies[1].token_ids
    assert [reply.usage.cached_tokens >= 16 for reply in replies] == [False, True]
