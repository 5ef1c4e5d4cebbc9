"""Compile for CUDA without a GPU: a child process with nvcc and, where there is no driver, a stand-in for it.

TVM's CUDA runtime links against the driver (libcuda.so.1). Where it cannot be loaded TVM does not fail: it embeds the
CUDA source in the library, to be compiled on the machine that runs it. So the child finds a stub of the driver, made
of the nine symbols that the runtime names, and what comes out is checked to be machine code for the architecture.
Loader paths are read when a process starts, hence the child; it also keeps TVM's crashes away from the build.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild import errors
from mlcbuild.compiler.fatbin import check_fat_binary
from mlcbuild.errors import CompileError, MlcbuildError, ToolchainError

DRIVER = "libcuda.so.1"
DRIVER_SYMBOLS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, what every stub returns
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
LOG_TAIL = 15  # lines of the child's log in an error message

Report = Callable[..., None]


def run_in_child(spec: Mapping[str, Any], destination: Path, report: Report) -> None:
    """Compile `spec` (see build.build_library) into `destination`, in a process of its own.

    Raises ToolchainError where nvcc or a C compiler is missing or nvcc does not know the architecture, CompileError
    where the child fails or its library holds no machine code, and whatever MlcbuildError the child raised.
    """
    target = spec["target"]
    nvcc = find_nvcc(target["name"])
    check_arch(nvcc, target["name"], target["tvm"]["arch"])
    with tempfile.TemporaryDirectory(prefix="mlcbuild-cuda-") as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        libraries = find_libraries(nvcc)
        if not can_load_driver():
            make_driver_stub(folder, target["name"])
            libraries.insert(0, folder)
        command = [sys.executable, "-m", __name__, str(folder / "spec.json"), str(destination), str(os.getpid())]
        _run(command, make_environment(nvcc, libraries), folder / "log", report)
    check_fat_binary(destination / target["library"], target["tvm"]["arch"])


def find_nvcc(target: str) -> Path:
    """nvcc on PATH, below $CUDA_HOME or in /usr/local/cuda; raises ToolchainError."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin:/usr/local/cuda/bin")
    if found is None:
        raise ToolchainError(
            f"target {target} needs nvcc, the CUDA compiler: not on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin",
            hint="install the CUDA 13 toolkit, or set CUDA_HOME to where it is; no GPU is needed",
        )
    return Path(found)


def check_arch(nvcc: Path, target: str, arch: str) -> None:
    """Raise ToolchainError if this nvcc cannot make code for `arch`, e.g. sm_90."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = listed.stdout.split()
    if not known:
        raise ToolchainError(
            f"{nvcc} --list-gpu-code failed: {(listed.stderr or 'no output').strip()}",
            hint="install the CUDA 13 toolkit, or set CUDA_HOME to where it is",
        )
    if arch.rstrip("af") not in known:
        raise ToolchainError(
            f"target {target} is for {arch}, which {nvcc} does not know (it knows {', '.join(known)})",
            hint="install a CUDA toolkit that supports this GPU, or choose another target",
        )


def find_libraries(nvcc: Path) -> list[Path]:
    """Folders that may hold libcudart: of nvcc's own toolkit, as nvcc itself says, and the usual ones."""
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    tops = re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    roots = [Path(top) for top in (*tops, os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda")]
    return [folder for root in dict.fromkeys(roots) if (folder := root / "lib64").is_dir()]


def can_load_driver() -> bool:
    """Whether this machine has NVIDIA's driver library."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def make_driver_stub(folder: Path, target: str) -> None:
    """Write `folder`/libcuda.so.1, whose functions all say that there is no device. Raises ToolchainError."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ToolchainError(
            f"target {target} needs a C compiler, and neither cc, gcc nor clang is on PATH",
            hint="install it, for example: apt-get install gcc",
        )
    source = folder / "driver_stub.c"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in DRIVER_SYMBOLS), "ascii")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / DRIVER, source], check=True, capture_output=True)


def make_environment(nvcc: Path, libraries: list[Path]) -> dict[str, str]:
    """The child's environment: TVM calls `nvcc` by name, and the loader must find the runtime and the driver."""
    package = Path(__file__).resolve().parents[2]
    before = {
        "PATH": [nvcc.parent],
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": [package],
    }
    environment = {**os.environ, "TVM_CUDA_COMPILE_MODE": "nvcc"}
    for name, folders in before.items():
        environment[name] = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])
    return environment


def _run(command: list[str], environment: dict[str, str], log: Path, report: Report) -> None:
    """Run the child in a process group of its own, relaying its reports; nothing of the group outlives this call."""
    failure: dict[str, str] | None = None
    with (
        open(log, "w+", encoding="utf-8", errors="replace") as messages,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    failure = message
                else:
                    report(message["text"], message["fraction"])
            code = child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if failure is not None:
        raise getattr(errors, failure["error"])(failure["message"], hint=failure["hint"])
    if code != 0:
        raise _make_error(code, log)


def _make_error(code: int, log: Path) -> CompileError:
    """What the child left behind, as one error; its whole log is kept, for the scratch folder goes away."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    handle, kept = tempfile.mkstemp(prefix="mlcbuild-cuda-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    how = f"was killed by signal {-code}" if code < 0 else f"failed with status {code}"
    tail = "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])
    return CompileError(
        f"the CUDA compile process {how}; the end of its log:\n{tail}", hint=f"see all of it: less {kept}"
    )


def main() -> None:
    """The child: compile the specification of the first argument into the folder that the second one names."""
    path, destination, parent = sys.argv[1:]
    _die_with(int(parent))
    # `report` owns the real stdout; whatever else is printed, by TVM or by nvcc, goes to the log
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    from mlcbuild.compiler.cheap_stack import cheap_stack

    try:
        with cheap_stack():
            check_runtime()
            from mlcbuild.compiler.build import compile_library

            spec = json.loads(Path(path).read_text(encoding="utf-8"))
            compile_library(
                spec, Path(destination), lambda text, fraction=None: send({"text": text, "fraction": fraction})
            )
    except MlcbuildError as error:
        send({"error": type(error).__name__, "message": error.message, "hint": error.hint})
        sys.exit(1)


def check_runtime() -> None:
    """Raise ToolchainError if TVM's CUDA runtime did not load: TVM would then embed source code, silently."""
    import tvm

    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        raise ToolchainError(
            "TVM's CUDA runtime cannot be loaded: it needs libcudart.so.13",
            hint="install the CUDA 13 toolkit, or set CUDA_HOME to where it is",
        )


def _die_with(parent: int) -> None:
    """Have the kernel end this process group, nvcc included, when the parent dies."""

    def end(*_: Any) -> None:
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        end()


if __name__ == "__main__":
    main()
