"""Phi-4-mini: control tokens around a JSON list.

<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin="<|tool_call|>",
    opening="[",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    between=", ",
    end="]<|/tool_call|>",
)
