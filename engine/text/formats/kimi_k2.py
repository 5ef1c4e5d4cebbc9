"""Kimi K2: marked sections, where a call has an id in place of a name. On one line:

    <|tool_calls_section_begin|>
    <|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|>
    <|tool_calls_section_end|>
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin="<|tool_calls_section_begin|>",
    before_name="<|tool_call_begin|>",
    before_arguments="<|tool_call_argument_begin|>",
    after_arguments="<|tool_call_end|>",
    between="",
    end="<|tool_calls_section_end|>",
    id_prefix="functions.",
)
