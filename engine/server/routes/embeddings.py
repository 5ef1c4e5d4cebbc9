"""POST /v1/embeddings: a vector for each text, from the model's own hidden states."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from engine.core import Output
from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.pooling import normalize
from engine.reply import AsyncReply
from engine.server.completion import collect
from engine.server.limits import check_prompt_length
from engine.server.protocol.embedding import MAX_INPUTS, Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from engine.server.routes.chat import ANSWERS, CLIENT_LEFT, run_while_connected
from engine.server.state import check_model_name, get_model, get_settings

router = APIRouter()


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=ANSWERS)
async def create_embeddings(
    body: EmbeddingRequest, request: Request, model: Annotated[LoadedModel, Depends(get_model)]
) -> Response:
    """Turn texts into vectors of length 1, whose products say how alike the texts are."""
    check_model_name(body.model, model)
    inputs = check_inputs(body, model, get_settings(request).max_prompt_chars)
    prompts = await asyncio.to_thread(make_tokens, inputs, model)
    outputs = await run_while_connected(request, embed(prompts, body, model))
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    tokens = sum(output.usage.prompt_tokens for output in outputs)
    answer = EmbeddingList(
        data=[make_embedding(index, output, body) for index, output in enumerate(outputs)],
        model=model.name,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def check_inputs(body: EmbeddingRequest, model: LoadedModel, max_chars: int) -> list[str | list[int]]:
    """The inputs of a request, of which there is at least one, but not too many. Raises InvalidRequest."""
    inputs, limits = body.get_inputs(), model.engine.limits
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"input holds {len(inputs)} inputs", hint=f"send 1 to {MAX_INPUTS}", param="input")
    if body.dimensions is not None and limits.hidden_size and body.dimensions > limits.hidden_size:
        raise InvalidRequest(
            f"dimensions is {body.dimensions}, and this model's embeddings have {limits.hidden_size}",
            hint="ask for fewer, or leave it out",
            param="dimensions",
        )
    check_prompt_length(sum(len(text) for text in inputs if isinstance(text, str)), max_chars)
    return inputs


def make_tokens(inputs: Sequence[str | list[int]], model: LoadedModel) -> list[list[int]]:
    """The tokens of each input; an empty text is refused by name. Raises InvalidRequest."""
    tokenizer = model.engine.tokenizer
    prompts = [tokenizer.encode(text) if isinstance(text, str) else text for text in inputs]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequest(f"input {index} is empty", hint="send at least one token", param="input")
    return prompts


async def embed(prompts: Sequence[list[int]], body: EmbeddingRequest, model: LoadedModel) -> list[Output]:
    """The last Output of each prompt; as many at a time as the engine runs, so that others find a place in its queue.

    Raises EngineError when one fails; then, and when this is cancelled, those that run are aborted.
    """
    name, size = f"embd-{uuid.uuid4().hex}", model.engine.limits.max_batch
    outputs: list[Output] = []
    for start in range(0, len(prompts), size):
        replies: list[AsyncReply] = []
        try:
            for index, prompt in enumerate(prompts[start : start + size], start):
                own = f"{name}-{index}"
                replies.append(model.engine.stream(prompt, request_id=own, pooling=body.pooling or "last"))
            for reply in replies:
                outputs.append(await collect(reply))
        finally:
            for reply in replies:
                reply.close()
    return outputs


def make_embedding(index: int, output: Output, body: EmbeddingRequest) -> Embedding:
    """One vector, cut to the dimensions that were asked for and of length 1 again."""
    assert output.embedding is not None
    vector = output.embedding
    if body.dimensions is not None and body.dimensions < len(vector):
        vector = normalize(vector[: body.dimensions])
    if body.encoding_format == "base64":
        return Embedding(index=index, embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii"))
    return Embedding(index=index, embedding=[float(number) for number in vector])
