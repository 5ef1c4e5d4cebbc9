"""Hermes, Qwen2.5, Qwen3: JSON between tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin="<tool_call>",
    before_name='\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n</tool_call>",
    between="\n<tool_call>",
)
