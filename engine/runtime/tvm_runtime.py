"""TVM's runtime alone, by its C interface: to import the package tvm takes two seconds and loads its compiler, 260 MB.

functions = load_library(Path("lib.so"))    # of the virtual machine in it, by name
functions["embed"](wrap(array), ...)
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import PackageInvalid

CPU, FIRST, POOLED = 1, 0, 2  # device type and number as DLPack has them; TVM's allocator that keeps what it frees
FAST = 1  # the kind of cores that TVM takes first; unbound threads run on any


def load_library(path: Path) -> Any:
    """The functions of a compiled model on the CPU, `found[name]`. Raises RuntimeError when it cannot be loaded."""
    machine = _load_runtime().load_module(str(path))["vm_load_executable"]()
    machine["vm_initialization"](CPU, FIRST, POOLED)
    return machine


def make_list(tensors: Sequence[Any]) -> Any:
    """TVM's own list, for an argument of many calls: one of Python's is made into it in each."""
    return _load_runtime().Array(tensors)


def get_wrap() -> Callable[[Any], Any]:
    """What makes TVM's tensor of a numpy array, over the same memory."""
    wrap: Callable[[Any], Any] = _load_runtime().from_dlpack
    return wrap


def limit_threads(count: int) -> None:
    """Let kernels that this thread launches use so many threads from now on, at most TVM_NUM_THREADS."""
    _get_configure()(FAST, count)


@cache
def _get_configure() -> Any:
    return _load_runtime().get_global_func("runtime.config_threadpool")


@cache
def _load_runtime() -> Any:
    """The module tvm_ffi with TVM's runtime behind it. Raises PackageInvalid where that is not installed."""
    with _without_torch():
        import tvm_ffi
    spec = importlib.util.find_spec("tvm")
    folders = [os.environ["TVM_LIBRARY_PATH"]] if "TVM_LIBRARY_PATH" in os.environ else []
    folders += [f"{folder}/lib" for folder in (spec.submodule_search_locations or [] if spec else [])]
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    name = f"{'' if sys.platform == 'win32' else 'lib'}tvm_runtime{suffix}"
    found = next((path for folder in folders if (path := Path(folder) / name).exists()), None)
    if found is None:
        raise PackageInvalid(f"there is no {name}, TVM's runtime", hint="pip install apache-tvm")
    ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)  # libraries of models look for its functions
    return tvm_ffi


@contextmanager
def _without_torch() -> Iterator[None]:
    """TVM's interface imports torch wherever it is installed, to be quicker with its tensors: a second for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
