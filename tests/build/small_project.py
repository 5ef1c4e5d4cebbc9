"""A project of three fake steps in a temporary folder, driven by the real doit: convert -> package -> verify.

Each step writes a line to the file `log` when it runs. CONVERT's `helper` is in a module of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VARIANT = "m/q4/x86-64-v3"
RECIPES = {
    "models/m.yaml": "family: llama\nsource: {path: m}\nlicence: Apache-2.0\n"
    "config: {model_type: llama, vocab_size: 8}\nlimits: {context_window: 8}\n",
    "models/m/weights.txt": "5",
    "quantizations/q4.yaml": "method: group\nbits: 4\ngroup_size: 32\ndtype: float16\n",
    "quantizations/q0.yaml": "method: plain\nbits: 32\ndtype: float32\n",
    # It needs nothing that this machine may lack, so the fake verify always has its turn.
    "targets/x86-64-v3.yaml": "kind: cpu\narch: {arch}\ntvm: {{kind: llvm}}\nlayouts: [rows16]\n",
    "matrices/default.yaml": "axes: {model: [m], quantization: [q4], target: [x86-64-v3]}\n",
}
PRELUDE = """
import json, os, time
from pathlib import Path
from mlcbuild.errors import WeightError
from mlcbuild.graph.action import Action

def log(text):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(text + "\\n")
"""
CONVERT = '''"""convert: a fake."""
from tasks.shared.maths import double
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action(
            "convert", build.weights_name, __name__, {"bits": build.quantization.bits},
            {"source": Path("recipes/models") / build.model.name}, {"weights": build.weights}, tools=("numpy",),
        )

def run(ctx):
    # a comment
    log(f"convert {ctx.params['bits']}")
    folder = ctx.outputs["weights"]
    folder.mkdir()
    text = (ctx.inputs["source"] / "weights.txt").read_text().strip()
    (folder / "w.txt").write_text(str(double(int(text)) + ctx.params["bits"]))
    (folder / "big.bin").write_bytes(b"x" * 100_000)
    print("what the step prints")
    time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
    if os.environ.get("FAKE_FAIL") == "mend":
        raise WeightError("shard 3 is cut short", hint="doit download:m")
    if os.environ.get("FAKE_FAIL") == "bug":
        raise ZeroDivisionError("a bug")
'''
MATHS = '''"""maths"""

def double(x):
    return 2 * x

def triple(x):
    return 3 * x
'''
PACKAGE = '''"""package: a fake."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("package", build.id, __name__, {}, {"weights": build.weights}, {"package": build.package},
                     after=(f"convert:{build.weights_name}",))

def run(ctx):
    log("package")
    folder = ctx.outputs["package"]
    folder.mkdir()
    digest = ctx.digest(ctx.inputs["weights"] / "w.txt")
    (folder / "manifest.json").write_text(json.dumps({"files": [{"size": 12_345_678}], "weights": digest}))
'''
VERIFY = '''"""verify: a fake."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("verify", build.id, __name__, {}, {"manifest": build.package / "manifest.json"},
                     {"record": build.package / "record.json"}, after=(f"package:{build.id}",))

def run(ctx):
    log("verify")
    ctx.outputs["record"].write_text(json.dumps({
        "quality": {"kl": 0.0125, "top1": 0.975}, "speed": {"decode": 61.5}, "random": False,
        "reply": {"prompt": "Hello?", "text": "Here I am."},
    }))
'''
SERVE = '''"""serve: a fake."""
from mlcbuild.graph.plan import make_package_task

VARIABLES = {"port": "where"}

def task_serve():
    """serve it"""
    return make_package_task(run_server)

def run_server(package, variables):
    print("serving", package.name, variables.get("port"))
'''


def make_project(root: Path) -> Path:
    """Write the project's files below `root`."""
    import platform

    files = {f"recipes/{name}": text for name, text in RECIPES.items()}
    target = files["recipes/targets/x86-64-v3.yaml"]
    files["recipes/targets/x86-64-v3.yaml"] = target.format(arch=platform.machine())
    files |= {
        "tasks/__init__.py": '"""tasks"""\n',
        "tasks/shared/__init__.py": '"""shared"""\n',
        "tasks/shared/prelude.py": PRELUDE,
        "tasks/shared/maths.py": MATHS,
        "tasks/convert.py": CONVERT,
        "tasks/package.py": PACKAGE,
        "tasks/verify.py": VERIFY,
        "tasks/serve.py": SERVE,
        "tasks/build.py": (ROOT / "tasks" / "build.py").read_text("utf-8"),
        "tasks/explain.py": (ROOT / "tasks" / "explain.py").read_text("utf-8"),
        "tasks/repro.py": (ROOT / "tasks" / "repro.py").read_text("utf-8"),
        "dodo.py": (ROOT / "dodo.py").read_text("utf-8"),
        "pyproject.toml": (ROOT / "pyproject.toml").read_text("utf-8"),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
        os.utime(root / name, (1_700_000_000, 1_700_000_000))  # as files of a checkout that was not made just now
    (root / "log").write_text("")
    return root


def make_command(*args: str) -> list[str]:
    """The command line of doit in this environment."""
    return [sys.executable, str(Path(sys.executable).with_name("doit")), *args]


def make_environment(root: Path, **settings: str) -> dict[str, str]:
    """The environment of a run in `root`; MLCBUILD_STORE and the like as settings."""
    return {**os.environ, "FAKE_LOG": str(root / "log"), "COLUMNS": "200", **settings}


def doit(root: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run doit in `root`."""
    environment = make_environment(root, **settings)
    return subprocess.run(
        make_command(*args), cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def take_log(root: Path) -> list[str]:
    """The steps that have run since the last call."""
    lines = (root / "log").read_text().splitlines()
    (root / "log").write_text("")
    return lines
