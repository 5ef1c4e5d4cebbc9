"""OpenAI's chat interface without a server: the fields of a request as arguments, its answer as an object.

    model = load_model(Path("artifacts/packages/tiny-q4f16_1-x86-64-v4"), Budget())
    client = Client(model)
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], n=2, logprobs=True)
    print(answer.choices[0].message.content)
    for chunk in client.chat.completions.create(messages=..., stream=True): ...
    answer = await AsyncClient(model).chat.completions.create(messages=...)

Requests, answers and refusals are those of the server, of which this needs no part that knows HTTP.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

from pydantic import ValidationError

from engine.choices import Choices, make_choice_params, start_choices
from engine.core import Output, SamplingParams, join_outputs
from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.reply import Reply
from engine.server.chunks import ChunkWriter, make_maker
from engine.server.completion import collect_all, find_error, make_completion
from engine.server.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from engine.server.protocol.errors import make_validation_error
from engine.server.wishes import check_model_name, check_supported, get_schedule, make_params, make_prompt, make_reading
from engine.text.reading import Reading


class Client:
    """`client.chat.completions.create(...)` over a loaded model, which stays its owner's to close."""

    def __init__(self, model: LoadedModel) -> None:
        self.chat = Chat(model)


class Chat:
    """`completions` of a Client."""

    def __init__(self, model: LoadedModel) -> None:
        self.completions = ChatCompletions(model)


class AsyncClient:
    """`await client.chat.completions.create(...)` over a loaded model, which stays its owner's to close."""

    def __init__(self, model: LoadedModel) -> None:
        self.chat = AsyncChat(model)


class AsyncChat:
    """`completions` of an AsyncClient."""

    def __init__(self, model: LoadedModel) -> None:
        self.completions = AsyncChatCompletions(model)


class ChatCompletions:
    """Chats of one model; usable from several threads at once."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    @overload
    def create(self, *, stream: Literal[True], **fields: Any) -> Iterator[ChatChunk]: ...

    @overload
    def create(self, *, stream: Literal[False] | None = None, **fields: Any) -> ChatCompletion: ...

    def create(self, *, stream: bool | None = None, **fields: Any) -> ChatCompletion | Iterator[ChatChunk]:
        """Answer a conversation; `fields` are those of POST /v1/chat/completions, where `model` may be left out.

        Raises InvalidRequest, Overloaded or EngineStopped at once, and the EngineError of a reply that failed: in a
        stream, where it broke off. Closing or dropping a stream aborts its replies.
        """
        job = make_job(self._model, stream, fields)
        replies = job.start()
        return job.stream(replies) if stream else job.collect(replies)


class AsyncChatCompletions:
    """Chats of one model, for an event loop."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    @overload
    async def create(self, *, stream: Literal[True], **fields: Any) -> AsyncIterator[ChatChunk]: ...

    @overload
    async def create(self, *, stream: Literal[False] | None = None, **fields: Any) -> ChatCompletion: ...

    async def create(self, *, stream: bool | None = None, **fields: Any) -> ChatCompletion | AsyncIterator[ChatChunk]:
        """As ChatCompletions.create; cancelling the task aborts the replies."""
        job = await asyncio.to_thread(make_job, self._model, stream, fields)
        choices = job.start_async()
        return job.stream_async(choices) if stream else job.make_answer(await collect_all(choices))


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request and how to answer it."""

    model: LoadedModel
    body: ChatRequest
    tokens: list[int]
    params: SamplingParams
    reading: Reading
    name: str
    created: int

    def start(self) -> list[Reply]:
        """Submit a request for each choice, or none when one is refused."""
        replies: list[Reply] = []
        try:
            for params in make_choice_params(self.params, self.body.n or 1):
                replies.append(self.model.engine.generate(self.tokens, params, **get_schedule(self.body)))
        except BaseException:
            for reply in replies:
                reply.close()
            raise
        return replies

    def start_async(self) -> Choices:
        """As `start`, for the running loop."""
        stream = partial(self.model.engine.stream, self.tokens, **get_schedule(self.body))
        return start_choices(stream, self.params, self.body.n or 1, self.name)

    def collect(self, replies: Sequence[Reply]) -> ChatCompletion:
        """The whole answer. Raises EngineError when a reply broke off."""
        whole: dict[int, Output] = {}
        for index, output in read_all(replies):
            whole[index] = join_outputs(whole[index], output) if index in whole else output
        return self.make_answer([whole[index] for index in sorted(whole)])

    def stream(self, replies: Sequence[Reply]) -> Iterator[ChatChunk]:
        """The chunks of the answer as they come."""
        writer = self._make_writer()
        yield from writer.start()
        for index, output in read_all(replies):
            yield from writer.add(index, output)
        yield from writer.finish()

    async def stream_async(self, choices: Choices) -> AsyncIterator[ChatChunk]:
        """As `stream`."""
        writer = self._make_writer()
        async with choices:
            for chunk in writer.start():
                yield chunk
            async for index, output in choices:
                for chunk in writer.add(index, output):
                    yield chunk
                error = find_error(output)
                if error is not None:
                    raise error
            for chunk in writer.finish():
                yield chunk

    def make_answer(self, outputs: Sequence[Output]) -> ChatCompletion:
        """The answer of replies that have ended."""
        names: Any = {"id": self.name, "created": self.created, "model": self.model.name}
        return make_completion(outputs, **names, reading=self.reading, body=self.body)

    def _make_writer(self) -> ChunkWriter:
        maker = make_maker(self.body, self.name, self.created, self.model.name)
        return ChunkWriter(maker, self.body.n or 1, self.reading)


def make_job(model: LoadedModel, stream: bool | None, fields: dict[str, Any]) -> Job:
    """Check a request, render its prompt and compile its grammar. Raises InvalidRequest or UnknownModel."""
    try:
        body = ChatRequest.model_validate({"model": model.name, "stream": stream, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        detail = make_validation_error([{**first, "loc": ("body", *first["loc"])}]).error
        raise InvalidRequest(detail.message, code=detail.code, param=detail.param) from None
    check_model_name(body.model, model)
    check_supported(body)
    tokens = make_prompt(body, model)
    params, reading = make_params(body, model, tokens), make_reading(body, model, tokens)
    return Job(model, body, tokens, params, reading, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))


def read_all(replies: Sequence[Reply]) -> Iterator[tuple[int, Output]]:
    """The Outputs of all replies in turn, each with its index. Raises EngineError when one broke off, ending all."""
    with ExitStack() as stack:
        live = [(index, stack.enter_context(reply)) for index, reply in enumerate(replies)]
        while live:
            for index, reply in list(live):
                output = next(reply)
                yield index, output
                error = find_error(output)
                if error is not None:
                    raise error
                if output.finish_reason is not None:
                    live.remove((index, reply))
