"""Mistral Small 3.2, Devstral, Magistral 1.1 and later: control tokens around names, and before arguments.

[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin="[TOOL_CALLS]",
    before_name="",
    before_arguments="[ARGS]",
    after_arguments="",
    between="[TOOL_CALLS]",
    short_ids=True,
)
