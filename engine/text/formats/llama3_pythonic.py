"""Llama 3.2 and 4, OLMo 3: a Python list of calls and nothing else; texts are in double quotes.

[get_weather(city="Oslo", days=3), now()]
"""

from __future__ import annotations

from engine.text.calls import Shape
from engine.text.literals import Literals

SHAPE = Shape(
    begin="[",
    before_name="",
    before_arguments="(",
    after_arguments=")",
    between=", ",
    end="]",
    whole=True,
    spelling=Literals(true="True", false="False", null="None", comma=", ", colon=": ", assign="="),
)
