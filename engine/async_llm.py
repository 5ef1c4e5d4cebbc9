"""The asynchronous twin of LLM: the same package, methods and errors, for programs with an event loop.

    from engine import AsyncLLM, SamplingParams

    async with AsyncLLM("artifacts/packages/tiny-q4f16_1-x86-64-v4") as llm:
        outputs = await asyncio.gather(*(llm.generate(text) for text in texts))
        async with await llm.stream_chat([{"role": "user", "content": "Hi"}]) as reply:
            async for output in reply:
                print(output.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core import Limits, Output, Pooling, SamplingParams, Stats, join_outputs
from engine.llm import LLM
from engine.reply import AsyncReply
from engine.text.tokenizer import Tokenizer


class AsyncLLM:
    """As LLM, with the same `options`. Loading blocks: make it before the loop starts, or use `AsyncLLM.load`.

    Cancelling a task that waits for a reply aborts that request.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._llm = LLM(path, **options)

    @classmethod
    async def load(cls, path: str | Path, **options: Any) -> AsyncLLM:
        """Open a package while the loop goes on. Raises what LLM raises."""
        return await asyncio.to_thread(cls, path, **options)

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer and chat template."""
        return self._llm.tokenizer

    @property
    def limits(self) -> Limits:
        """Context, batch and cache sizes."""
        return self._llm.limits

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Output:
        """Continue a text or tokens; the whole reply as one Output. See LLM.generate, which raises the same."""
        return await _read_all(await self.stream(prompt, params, priority=priority, timeout=timeout))

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncReply:
        """As `generate`, as an asynchronous iterator of Outputs; closing or dropping it aborts."""
        # Tokenizing a long text takes a while: not on the loop.
        tokens = await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        return self._llm.thread.stream(tokens, params, priority=priority, timeout=timeout)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **variables: Any
    ) -> Output:
        """Answer a conversation; the whole reply as one Output. Raises what LLM.chat raises."""
        return await _read_all(await self.stream_chat(messages, params, **variables))

    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **variables: Any
    ) -> AsyncReply:
        """As `chat`, as an asynchronous iterator of Outputs."""
        tokens = await asyncio.to_thread(self.tokenizer.encode_chat, messages, **variables)
        return self._llm.thread.stream(tokens, params)

    async def embed(self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "last") -> NDArray[np.float32]:
        """Embeddings [texts, hidden]; see LLM.embed."""
        return await asyncio.to_thread(self._llm.embed, texts, pooling=pooling)

    def get_stats(self) -> Stats:
        """Gauges and counters of this moment."""
        return self._llm.get_stats()

    async def close(self) -> None:
        """Abort what runs and release the package. Callable again; also done when the object is dropped."""
        await asyncio.to_thread(self._llm.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _read_all(reply: AsyncReply) -> Output:
    async with reply:
        output = await reply.__anext__()
        async for more in reply:
            output = join_outputs(output, more)
    if output.error is not None:
        raise output.error
    return output
