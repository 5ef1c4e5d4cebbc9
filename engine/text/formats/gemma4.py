"""Gemma 4: names without quotes, texts between marks.

<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.literals import Literals

SHAPE = Shape(
    begin="<|tool_call>",
    before_name="call:",
    before_arguments="{",
    after_arguments="}<tool_call|>",
    between="<|tool_call>",
    spelling=Literals(mark='<|"|>', comma=",", colon=":", assign=":"),
)
