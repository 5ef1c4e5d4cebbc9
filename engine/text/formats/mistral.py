"""Mistral 7B v0.3, Nemo, Small 2409 to 3.1: a control token and a JSON list.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin="[TOOL_CALLS]",
    opening="[",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    between=", ",
    end="]",
    short_ids=True,
)
