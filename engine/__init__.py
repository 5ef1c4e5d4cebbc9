"""engine: opens an mlcbuild package and generates text from it, in process or over HTTP.

    from engine import LLM, SamplingParams

`LLM`, or `AsyncLLM`, is the whole of it for a program; engine.openai_api has OpenAI's interface; `EngineThread` is what
the server drives. The names are loaded when first used, so that `engine.artifact` stays free of numpy, the tokenizer
and TVM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.async_llm import AsyncLLM
    from engine.core import Output, SamplingParams, Usage
    from engine.errors import EngineError, EngineStopped, InvalidRequest, Overloaded, PackageInvalid
    from engine.llm import LLM
    from engine.thread import EngineThread

__all__ = [
    "AsyncLLM",
    "LLM",
    "EngineError",
    "EngineStopped",
    "EngineThread",
    "InvalidRequest",
    "Output",
    "Overloaded",
    "PackageInvalid",
    "SamplingParams",
    "Usage",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineThread": "thread",
    "Output": "core",
    "SamplingParams": "core",
    "Usage": "core",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.{_MODULES.get(name, 'errors')}"), name)
