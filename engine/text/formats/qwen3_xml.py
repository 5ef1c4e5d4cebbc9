"""Qwen3-Coder and Qwen3.5: parameters between tags.

<tool_call>
<function=get_weather>
<parameter=city>
Oslo
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.tagged import Tagged

SHAPE = Shape(
    begin="<tool_call>",
    before_name="\n<function=",
    before_arguments=">\n",
    after_arguments="</function>\n</tool_call>",
    between="\n<tool_call>",
    spelling=Tagged(before_key="<parameter=", before_value=">\n", after_value="\n</parameter>\n"),
)
