"""What a chat request asks of the engine: its prompt, its sampling, and the grammar of its reply. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.core import SamplingParams
from engine.errors import InvalidRequest, UnknownModel
from engine.model import LoadedModel
from engine.sampling.grammar import add_alternative
from engine.server.protocol.chat import ChatRequest
from engine.server.protocol.messages import MessagesRequest
from engine.server.protocol.responses import ResponsesRequest
from engine.server.protocol.structured import StructuredFields, make_output_grammar
from engine.server.protocol.tools import ToolChoice, make_signature, make_tool_choice, make_tools_grammar
from engine.text.reading import Reading
from engine.text.reasoning import add_thinking, find_thinking

PROMPT_END = 16  # tokens at the end of the prompt that say whether it opens the reply's thoughts
SAME = (  # fields of the body that are fields of SamplingParams
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "logit_bias", "seed", "max_tokens", "ignore_eos"),
    *("prompt_logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty"),
)

STRUCTURED = tuple(StructuredFields.__annotations__)  # fields of the body, each of which asks for a grammar


def check_model_name(name: str, model: LoadedModel) -> None:
    """Raise UnknownModel unless a client means `model`, by its name or its variant id."""
    if name not in (model.name, model.variant):
        raise UnknownModel(
            f"the model '{name}' does not exist",
            hint=f"this server has '{model.name}'",
            code="model_not_found",
            param="model",
        )


def check_supported(body: ChatRequest | ResponsesRequest | MessagesRequest, hint: str = "leave it out") -> None:
    """Raise InvalidRequest for a field whose wish could only be ignored."""
    name = body.get_unsupported()
    if name is not None:
        raise InvalidRequest(
            f"this server does not support this value of '{name}'",
            hint=hint,
            code="unsupported_parameter",
            param=name,
        )


def make_prompt(body: ChatRequest, model: LoadedModel) -> list[int]:
    """The tokens of the conversation. Raises InvalidRequest when they cannot be made."""
    messages = [message.make_template_value() for message in body.messages]
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or []] if get_tool_choice(body).tools else []
    variables = get_variables(body, model)
    try:
        return model.engine.tokenizer.encode_chat(messages, tools=tools, **variables)
    except InvalidRequest:
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        broken = [call for call in calls if isinstance(call["arguments"], str)]
        for call in broken:  # of a call that was cut off: some templates want an object at any rate
            call["arguments"] = {"arguments": call["arguments"]}
        if not broken:
            raise
    return model.engine.tokenizer.encode_chat(messages, tools=tools, **variables)


def make_params(body: ChatRequest, model: LoadedModel, prompt: Sequence[int] = ()) -> SamplingParams:
    """What the request says of sampling, the model's own defaults for the rest, and the grammar of the reply.

    Compiles that grammar, which may take a while; its reply may think before if the end of `prompt` allows it.
    Raises InvalidRequest when it does not compile.
    """
    given: dict[str, Any] = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.stop_token_ids:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.stop:
        given["stop"] = (*model.defaults.stop, *body.stop)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    wanted = make_reply_grammar(body, model, make_reading(body, model, prompt))
    if wanted is not None:
        text, param = wanted
        given["grammar"] = model.engine.grammars.compile(text, param=param)
    return replace(model.defaults, **given)


async def prepare_params(body: ChatRequest, model: LoadedModel, prompt: Sequence[int] = ()) -> SamplingParams:
    """As make_params, for an event loop: what wants a grammar waits for the others that do, and nobody else for it."""
    if not (body.tools or any(getattr(body, name) not in (None, "", {}) for name in STRUCTURED)):
        return make_params(body, model, prompt)
    loop, pool = asyncio.get_running_loop(), model.engine.grammars.pool
    return await loop.run_in_executor(pool, make_params, body, model, prompt)


def get_schedule(body: ChatRequest) -> dict[str, Any]:
    """What the request says of when to run it, as EngineThread.stream takes it."""
    return {"priority": body.priority or 0, "timeout": body.timeout}


def get_tool_choice(body: ChatRequest) -> ToolChoice:
    """Which tools the reply may call. Raises InvalidRequest."""
    return make_tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls)


def make_reading(body: ChatRequest, model: LoadedModel, prompt: Sequence[int]) -> Reading:
    """How to read the replies to `prompt`; to a prompt of no tokens, which is no conversation, as plain text."""
    end = model.engine.tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False)
    thinking = find_thinking(model.reasoning, end) if prompt else None
    tools = get_tool_choice(body).tools
    form = model.form if tools or (model.form is not None and model.form.channels and prompt) else None
    schemas = {tool.name: make_signature(tool).parameters for tool in tools}
    return Reading(form, thinking, schemas, model.engine.tokenizer.count, model.note_broken_call)


def make_reply_grammar(body: ChatRequest, model: LoadedModel, reading: Reading) -> tuple[str, str] | None:
    """What the reply is held to, and the parameter that says so: calls, or structured output, or either of them."""
    choice, thinking = get_tool_choice(body), reading.thinking
    not_first = thinking.begin if thinking is not None and not thinking.opened else ""
    output = make_output_grammar(body)
    either = output is not None and bool(choice.tools) and not choice.required
    choice = replace(choice, required=choice.required or either)
    calls = make_tools_grammar(choice, model.form, not_first=not_first)
    wanted = output if calls is None else (calls, "tools")
    if either and output is not None and calls is not None and model.form is not None:
        if model.form.whole or model.form.channels:  # its calls look like structured output, or begin alike
            raise InvalidRequest(
                f"{output[1]} does not go with tools that this model may call or not",
                hint="send tool_choice none or required",
                param=output[1],
            )
        wanted = add_alternative(calls, output[0]), output[1]
    elif output is not None and calls is None and reading.form is not None:
        wanted = reading.form.make_answer_grammar(output[0]), output[1]
    return wanted if wanted is None or thinking is None else (add_thinking(wanted[0], thinking), wanted[1])


def get_variables(body: ChatRequest, model: LoadedModel) -> dict[str, Any]:
    """Further names for the chat template, enable_thinking above all. Raises InvalidRequest for names that are ours."""
    variables = dict(body.chat_template_kwargs or {})
    if taken := sorted(variables.keys() & {"messages", "tools", "add_generation_prompt"}):
        raise InvalidRequest(f"{taken[0]} is no free name", hint="leave it out", param="chat_template_kwargs")
    if body.reasoning_effort not in (None, "none") and not model.thinks:
        raise InvalidRequest("this model does not think", hint="leave it out", param="reasoning_effort")
    if body.reasoning_effort is not None:
        effort = body.reasoning_effort
        variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"} | variables
    return variables
