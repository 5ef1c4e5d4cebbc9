"""POST /tokenize and /detokenize: text to tokens and back, as the engine does it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from engine.errors import InvalidRequest
from engine.model import LoadedModel
from engine.server.limits import check_prompt_length
from engine.server.protocol.tokens import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from engine.server.routes.chat import ANSWERS
from engine.server.state import check_model_name, get_model, get_settings

router = APIRouter()
Model = Annotated[LoadedModel, Depends(get_model)]


@router.post("/tokenize", responses=ANSWERS)
async def tokenize(body: TokenizeRequest, request: Request, model: Model) -> TokenizeReply:
    """Tokens of a text, or of a conversation as the chat template writes it."""
    if body.model is not None:
        check_model_name(body.model, model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either 'prompt' or 'messages'", param="prompt")
    length = sum(len(m.content or "") for m in body.messages or []) + len(body.prompt or "")
    check_prompt_length(length, get_settings(request).max_prompt_chars)
    tokens = await asyncio.to_thread(make_tokens, body, model)
    return TokenizeReply(count=len(tokens), max_model_len=model.engine.limits.max_length, tokens=tokens)


def make_tokens(body: TokenizeRequest, model: LoadedModel) -> list[int]:
    """Raises InvalidRequest when they cannot be made."""
    tokenizer = model.engine.tokenizer
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    messages = [message.make_template_value() for message in body.messages or []]
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or []]
    return tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=body.add_generation_prompt)


@router.post("/detokenize", responses=ANSWERS)
async def detokenize(body: DetokenizeRequest, request: Request, model: Model) -> DetokenizeReply:
    """Text of tokens."""
    if body.model is not None:
        check_model_name(body.model, model)
    vocab_size = model.engine.limits.vocab_size
    if any(not 0 <= token < vocab_size for token in body.tokens):
        raise InvalidRequest(
            "a token is not in the vocabulary", hint=f"it must be 0 to {vocab_size - 1}", param="tokens"
        )
    decode = model.engine.tokenizer.decode
    text = await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)
    return DetokenizeReply(prompt=text)
