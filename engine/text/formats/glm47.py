"""GLM 4.7: as glm45, without line ends.

<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.tagged import Tagged

SHAPE = Shape(
    begin="<tool_call>",
    before_name="",
    before_arguments="",
    after_arguments="</tool_call>",
    between="<tool_call>",
    spelling=Tagged(before_key="<arg_key>", before_value="</arg_key><arg_value>", after_value="</arg_value>"),
)
