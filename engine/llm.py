"""A package as a Python object: generate and chat, whole or streamed, without a server.

    from engine import LLM, SamplingParams

    with LLM("artifacts/packages/tiny-q4f16_1-x86-64-v4") as llm:
        print(llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0)).text)
        for output in llm.stream("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.text, end="", flush=True)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.artifact import open_package
from engine.core import Limits, Output, Pooling, SamplingParams, Stats, join_outputs
from engine.reply import Reply
from engine.runtime.memory import Budget
from engine.thread import DEFAULT_QUEUE_LIMIT, EngineThread

if TYPE_CHECKING:  # see make_package_engine
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

    from engine.engine import Engine
    from engine.text.tokenizer import Tokenizer


class LLM:
    """Opens a package and loads it into a thread of its own; usable from several threads at once.

    `mode` (local, interactive, server), `kv_tokens` and `memory_fraction` decide how many requests run at once and how
    large the KV cache is: see engine.runtime.memory. `prefix_cache`: whether requests read what earlier ones that
    begin alike have computed. `draft_tokens`: how many tokens may be guessed ahead, from the text itself or by the
    small model in the package `draft`; 0 = none. `cache_file`: where the prefix cache is kept until the next time.
    `queue_limit` is the number of requests that may wait. All requests run together: start several with `stream`, then
    read each.
    Raises PackageInvalid for a package that this machine cannot run, DoesNotFit when its memory is too small.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mode: str = "local",
        kv_tokens: int | None = None,
        memory_fraction: float = 0.85,
        prefix_cache: bool = True,
        draft_tokens: int = 0,
        draft: str | Path | None = None,
        cache_file: str | Path | None = None,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
    ) -> None:
        budget = Budget(mode, kv_tokens, memory_fraction)
        options: Any = {"prefix_cache": prefix_cache, "draft_tokens": draft_tokens}
        options |= {"draft": draft and Path(draft), "cache_file": cache_file and Path(cache_file)}
        make = make_package_engine(Path(path), budget, **options)
        self.thread = EngineThread(make, queue_limit=queue_limit)
        self._finalizer = weakref.finalize(self, self.thread.close)

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer and chat template."""
        return self.thread.tokenizer

    @property
    def limits(self) -> Limits:
        """Context, batch and cache sizes."""
        return self.thread.limits

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Output:
        """Continue a text (tokenized with the model's own beginning) or tokens; the whole reply as one Output.

        `priority`: smaller runs sooner. After `timeout` seconds it fails with DeadlineExceeded. Raises InvalidRequest,
        Overloaded or EngineStopped, and the EngineError of a reply that failed.
        """
        return _read_all(self.stream(prompt, params, priority=priority, timeout=timeout))

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Reply:
        """As `generate`, as an iterator of Outputs; closing or dropping it aborts. A failed reply ends with `error`."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self.thread.generate(tokens, params, priority=priority, timeout=timeout)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **variables: Any
    ) -> Output:
        """Answer a conversation; the whole reply as one Output. `variables` go to the template: tools=[...], ...

        Raises what `generate` raises, and InvalidRequest when the template refuses the messages.
        """
        return _read_all(self.stream_chat(messages, params, **variables))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **variables: Any
    ) -> Reply:
        """As `chat`, as an iterator of Outputs."""
        return self.thread.generate(self.tokenizer.encode_chat(messages, **variables), params)

    def embed(self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "last") -> NDArray[np.float32]:
        """The embeddings of texts (tokenized with the model's own beginning) or tokens: [texts, hidden], of length 1.

        `pooling`: the hidden states of the last token, or the mean of all. Raises what `generate` raises.
        """
        import numpy as np

        found = []
        for start in range(0, len(texts), self.limits.max_batch):
            some = texts[start : start + self.limits.max_batch]
            prompts = [self.tokenizer.encode(text) if isinstance(text, str) else text for text in some]
            replies = [self.thread.generate(tokens, pooling=pooling) for tokens in prompts]
            found += [_read_all(reply).embedding for reply in replies]
        return np.array(found, np.float32).reshape(len(texts), self.limits.hidden_size)

    def get_stats(self) -> Stats:
        """Gauges and counters of this moment."""
        return self.thread.get_stats()

    def close(self) -> None:
        """Abort what runs and release the package. Callable again; also done when the object is dropped."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_package_engine(
    path: Path,
    budget: Budget,
    *,
    prefix_cache: bool = True,
    draft_tokens: int = 0,
    draft: Path | None = None,
    cache_file: Path | None = None,
) -> Callable[[], Engine]:
    """What EngineThread takes: a function that opens the package, on the thread that calls it, and loads TVM.

    The tokenizer, which takes a tenth of a second, is read meanwhile by a thread that does not hold Python's lock:
    so whatever takes long to import is imported after that has begun.
    """

    def make() -> Engine:
        from concurrent.futures import ThreadPoolExecutor

        package = open_package(path)
        with ThreadPoolExecutor(1, "tokenizer") as pool:
            reading = pool.submit(_read_backend, package.root)
            from engine.runtime.pair import load_pair
            from engine.runtime.tvm_executor import TvmExecutor

            packages, small = [package], None
            if draft is None or not draft_tokens:
                executor = TvmExecutor(package, budget)
            else:
                packages.append(open_package(draft))
                executor, small = load_pair(package, packages[1], budget)
            from engine.engine import Engine  # meanwhile a thread touches the weights
            from engine.text.reading import get_marks
            from engine.text.tokenizer import load_tokenizer

            marks = get_marks(package.manifest.recipes["model"]["chat"])
            tokenizer = load_tokenizer(package.root, marks=marks, backend=reading.result())
        options: Any = {"prefix_cache": prefix_cache, "draft_tokens": draft_tokens, "draft": small}
        if cache_file is not None:
            from engine.cache_file import CacheFile, make_owner

            options["cache_file"] = CacheFile(cache_file, make_owner(packages))
        return Engine(executor, tokenizer, **options)

    return make


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    from engine.text.tokenizer import read_backend

    return read_backend(folder)


def _read_all(reply: Reply) -> Output:
    with reply:
        output = reduce(join_outputs, reply)
    if output.error is not None:
        raise output.error
    return output
