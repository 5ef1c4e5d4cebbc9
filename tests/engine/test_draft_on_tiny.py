"""tiny-draft guesses for tiny, over real kernels: the same tokens as alone, and a package that is no use is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small_engines import make_request, run_all

from engine.artifact import File, open_package
from engine.bench.guessing import measure_guessing
from engine.engine import Engine
from engine.errors import InvalidSetting
from engine.runtime.memory import Budget
from engine.runtime.pair import check_alike, check_context, load_pair
from engine.runtime.tvm_executor import TvmExecutor
from engine.sampling.grammar import GrammarCompiler, make_json_grammar
from engine.text.tokenizer import load_tokenizer

TEXTS = ("Tell me a story about a red ball and a dog.", "What is the capital of France?", "Count to ten.", "Hi")
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


@pytest.fixture(scope="module")
def pair(tiny_package: Path, draft_package: Path) -> Iterator[tuple[TvmExecutor, TvmExecutor]]:
    executors = load_pair(open_package(tiny_package), open_package(draft_package), Budget(kv_tokens=2048))
    yield executors
    for executor in executors:
        executor.close()


def make_engine(package: Path, pair: tuple[TvmExecutor, TvmExecutor], draft_tokens: int) -> Engine:
    draft = pair[1] if draft_tokens else None
    return Engine(pair[0], load_tokenizer(package), weigh_guesses=False, draft_tokens=draft_tokens, draft=draft)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("grammar", [False, True])
def test_replies_are_those_of_the_large_model(
    tiny_package: Path, pair: tuple[TvmExecutor, TvmExecutor], temperature: float, grammar: bool
) -> None:
    replies = []
    for draft_tokens in (0, 4):
        engine = make_engine(tiny_package, pair, draft_tokens)
        params = {"temperature": temperature, "max_tokens": 60, "ignore_eos": not grammar}
        if grammar:
            params["grammar"] = GrammarCompiler(engine.tokenizer).compile(make_json_grammar(SCHEMA))
        for seed, text in enumerate(TEXTS * 2):
            prompt = engine.tokenizer.encode_chat([{"role": "user", "content": text}])
            engine.add(make_request(str(seed), prompt, seed=seed, **params))
        replies.append({name: output.token_ids for name, output in run_all(engine).items()})
    assert replies[0] == replies[1]
    stats = engine.get_stats()
    assert stats.right_tokens > 0.3 * stats.guessed_tokens > 30
    assert stats.free_pages == stats.num_pages


def test_both_caches_are_within_the_budget(pair: tuple[TvmExecutor, TvmExecutor]) -> None:
    large, small = pair
    assert replace(large.limits, hidden_size=0) == replace(small.limits, hidden_size=0)
    assert large.limits.num_pages == 2048 // 16


def test_a_draft_that_is_no_use_is_refused(tiny_package: Path, draft_package: Path) -> None:
    package, draft = open_package(tiny_package), open_package(draft_package)
    other = replace(draft.manifest, files=(File("tokenizer.json", 1, "0" * 64),))
    with pytest.raises(InvalidSetting) as caught:
        check_alike(package, replace(draft, manifest=other))
    assert str(caught.value) == (
        f"draft={draft.root.name}: this package cannot draft here: its tokenizer is not that of "
        f"{package.manifest.variant}\n"
        "  hint: give a smaller model of the same family, or speculative=lookup, which needs none"
    )
    kv = replace(draft.manifest.library.kv, page_size=32)
    other = replace(draft.manifest, library=replace(draft.manifest.library, kv=kv))
    with pytest.raises(InvalidSetting, match=r"its KV cache has \('tensor', 32\) pages"):
        check_alike(package, replace(draft, manifest=other))
    library = replace(draft.manifest.library, limits=replace(draft.manifest.library.limits, context_window=64))
    executor = TvmExecutor(package, Budget(kv_tokens=512))
    with pytest.raises(InvalidSetting, match="its context holds 64 tokens, and the engine's 512"):
        check_context(replace(draft, manifest=replace(draft.manifest, library=library)), executor.limits)
    executor.close()


def test_what_guessing_gives_is_measured(tiny_package: Path, pair: tuple[TvmExecutor, TvmExecutor]) -> None:
    found = measure_guessing(*pair, load_tokenizer(tiny_package), 4, 1)
    assert [(g.text, g.way) for g in found] == [
        (text, way) for text in ("json", "code", "story") for way in ("plain", "lookup", "draft")
    ]
    assert all(g.tokens_per_step == 1 and g.speedup == 1 and not g.guessed for g in found if g.way == "plain")
    assert all(g.tokens_per_step >= 1 and g.speedup > 0 and g.right <= g.guessed for g in found)
    assert any(g.right for g in found)
