"""FunctionGemma: names without quotes, texts between marks.

<start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:3}<end_function_call>
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.literals import Literals

SHAPE = Shape(
    begin="<start_function_call>",
    before_name="call:",
    before_arguments="{",
    after_arguments="}<end_function_call>",
    between="<start_function_call>",
    spelling=Literals(mark="<escape>", comma=",", colon=":", assign=":"),
)
