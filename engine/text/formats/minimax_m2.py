"""MiniMax M2: parameters between tags, all calls in one section.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Oslo</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.tagged import Tagged

SHAPE = Shape(
    begin="<minimax:tool_call>",
    before_name='\n<invoke name="',
    before_arguments='">\n',
    after_arguments="</invoke>",
    between="",
    end="\n</minimax:tool_call>",
    spelling=Tagged(before_key='<parameter name="', before_value='">', after_value="</parameter>\n"),
)
