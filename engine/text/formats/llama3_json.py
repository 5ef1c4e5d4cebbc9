"""Llama 3.1 to 3.3: one JSON object and nothing else; further calls, which the models seldom make, after a semicolon.

{"name": "get_weather", "parameters": {"city": "Oslo"}}
"""

from __future__ import annotations

from engine.text.calls import Shape

SHAPE = Shape(
    begin='{"name": "',
    before_name="",
    before_arguments='", "parameters": ',
    after_arguments="}",
    between='; {"name": "',
    whole=True,
)
