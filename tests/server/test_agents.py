"""Programs as people write them, against the server with tiny: agent loops over two tools, LangChain's chat model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
from running import Running

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = {"get_weather": ("Get the weather in a city", CITY), "get_time": ("Get the local time in a city", CITY)}
RUN: dict[str, Callable[..., Any]] = {
    "get_weather": lambda city: {"sky": "rainy", "temperature": len(city)},
    "get_time": lambda city: {"time": f"1{len(city)}:30"},
}
QUESTIONS = [
    ("What is the weather in Oslo?", ["get_weather"], "It is rainy in Oslo, 4 degrees."),
    ("What time is it in Paris?", ["get_time"], "It is 15:30 in Paris."),
    ("What is the capital of France?", [], "The capital of France is Paris."),
]


@pytest.mark.parametrize(("question", "called", "answer"), QUESTIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_openai(tiny: openai.OpenAI, stream: bool, question: str, called: list[str], answer: str) -> None:
    """The loop of every tutorial: call what the model asks for until it answers."""
    tools = [
        {"type": "function", "function": {"name": n, "description": d, "parameters": p}} for n, (d, p) in ABOUT.items()
    ]
    messages: list[Any] = [{"role": "user", "content": question}]
    calls = []
    for _ in range(4):
        wanted = {"model": "tiny", "messages": messages, "tools": tools, "temperature": 0}
        if stream:
            with tiny.chat.completions.stream(**wanted) as events:
                for _event in events:
                    pass
                message = events.get_final_completion().choices[0].message
        else:
            message = tiny.chat.completions.create(**wanted).choices[0].message
        messages.append(message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            calls.append(call.function.name)
            result = RUN[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    assert (calls, message.content) == (called, answer)


@pytest.mark.parametrize(("question", "called", "answer"), QUESTIONS)
def test_an_agent_with_anthropic(tiny_server: Running, question: str, called: list[str], answer: str) -> None:
    tools = [{"name": name, "description": text, "input_schema": schema} for name, (text, schema) in ABOUT.items()]
    messages: list[Any] = [{"role": "user", "content": question}]
    calls = []
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="none", max_retries=0) as claude:
        for _ in range(4):
            wanted = {"model": "tiny", "max_tokens": 100, "messages": messages, "tools": tools}
            message = claude.messages.create(**wanted, extra_body={"temperature": 0})
            messages.append({"role": "assistant", "content": message.content})
            if message.stop_reason != "tool_use":
                break
            results = []
            for block in message.content:
                if block.type == "tool_use":
                    calls.append(block.name)
                    text = json.dumps(RUN[block.name](**block.input))
                    results.append({"type": "tool_result", "tool_use_id": block.id, "content": text})
            messages.append({"role": "user", "content": results})
    assert (calls, message.content[0].text) == (called, answer)


@pytest.fixture
def langchain(tiny_server: Running) -> Any:
    module = pytest.importorskip("langchain_openai", reason="MLCBUILD_EXTRAS=clients installs it")
    return module.ChatOpenAI(
        base_url=f"{tiny_server.url}/v1", api_key="none", model="tiny", temperature=0, max_retries=0
    )


def test_langchain(langchain: Any) -> None:
    question, _, answer = QUESTIONS[2]
    reply = langchain.invoke(question)
    assert (reply.content, reply.response_metadata["finish_reason"]) == (answer, "stop")
    assert reply.usage_metadata["output_tokens"] > 2
    chunks = list(langchain.stream(question, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == answer
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 2
    assert [reply.content for reply in langchain.batch([question] * 3)] == [answer] * 3

    async def ask() -> str:
        try:
            return (await langchain.ainvoke(question)).content
        finally:
            await langchain.root_async_client.close()

    assert asyncio.run(ask()) == answer


def test_an_agent_with_langchain(langchain: Any) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        return json.dumps(RUN["get_weather"](city))

    @tool
    def get_time(city: str) -> str:
        """Get the local time in a city"""
        return json.dumps(RUN["get_time"](city))

    offered = {"get_weather": get_weather, "get_time": get_time}
    bound = langchain.bind_tools(list(offered.values()))
    for question, called, answer in QUESTIONS:
        messages: list[Any] = [HumanMessage(question)]
        calls = []
        for _ in range(4):
            messages.append(reply := bound.invoke(messages))
            calls += [call["name"] for call in reply.tool_calls]
            messages += [offered[call["name"]].invoke(call) for call in reply.tool_calls]
            if not reply.tool_calls:
                break
        assert (calls, reply.content) == (called, answer)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_a_class(langchain: Any, method: str) -> None:
    import pydantic

    class Weather(pydantic.BaseModel):
        """The weather"""

        sky: str = pydantic.Field(max_length=12)
        degrees: int = pydantic.Field(ge=0, le=40)

    found = langchain.with_structured_output(Weather, method=method).invoke("What is the weather in Oslo?")
    assert isinstance(found, Weather)
