"""A project of five fake steps, as the real graph has them: download, convert, compile, package, verify.

What they make depends on the checkpoint's text, the quantization's bits, a helper's code and the target, and on
nothing else, so that any build can be compared with a clean one. `pause` gives a step some length (FAKE_SLEEP);
FAKE_FAIL names a step that fails. Each step writes `begin STEP NAME` to the file `log`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import small_project

PACKAGES = ("m-q0-x86-64-v3", "m-q4-x86-64-v3")
PRELUDE = '''"""what all steps here use"""
import hashlib, json, os, time
from pathlib import Path
from mlcbuild.errors import WeightError
from mlcbuild.graph.action import Action, get_provenance_path

def begin(step, name):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"begin {step} {name}\\n")
    if os.environ.get("FAKE_FAIL") == step:
        raise WeightError("a fake failure", hint="none")
    pause()

def pause():
    time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))

def write(path, text, size):
    """In two halves, so that a crash may leave one."""
    data = (text * size).encode()[:size]
    with open(path, "wb") as file:
        file.write(data[: size // 2])
        pause()
        file.write(data[size // 2 :])
'''
DOWNLOAD = '''"""download: a fake."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("download", build.model.name, __name__, {}, {"checkpoint": Path("recipes/models/m")},
                     {"source": build.sources})

def run(ctx):
    begin("download", "m")
    folder = ctx.outputs["source"]
    folder.mkdir()
    text = (ctx.inputs["checkpoint"] / "weights.txt").read_text().strip()
    write(folder / "model.bin", text, 80_000)
    (folder / "tokenizer.txt").write_text("the tokenizer, which never changes")
'''
CONVERT = '''"""convert: a fake."""
from tasks.shared.maths import double
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("convert", build.weights_name, __name__,
                     {"bits": build.quantization.bits, "name": build.weights_name},
                     {"weights": build.sources / "*.bin"}, {"weights": build.weights},
                     after=(f"download:{build.model.name}",))

def run(ctx):
    begin("convert", ctx.params["name"])
    folder = ctx.outputs["weights"]
    folder.mkdir()
    number = int((ctx.inputs["weights"] / "model.bin").read_text()[0])
    write(folder / "shard.bin", f"{double(number)} in {ctx.params['bits']} bits, ", 90_000)
    (folder / "index.json").write_text(json.dumps({"value": double(number), "bits": ctx.params["bits"]}))
'''
COMPILE = '''"""compile: a fake."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("compile", build.id, __name__, {"bits": build.quantization.bits, "name": build.id}, {},
                     {"library": build.library})

def run(ctx):
    begin("compile", ctx.params["name"])
    ctx.outputs["library"].mkdir()
    write(ctx.outputs["library"] / "lib.so", f"code for {ctx.params['bits']} bits, ", 70_000)
'''
PACKAGE = '''"""package: a fake."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        parts = (f"compile:{build.id}", f"download:{build.model.name}", f"convert:{build.weights_name}")
        yield Action("package", build.id, __name__, {"name": build.id},
                     {"library": build.library, "weights": build.weights, "source": build.sources,
                      **{f"made-{task[:4]}": get_provenance_path(task) for task in parts}},
                     {"package": build.package}, after=parts)

def run(ctx):
    begin("package", ctx.params["name"])
    folder = ctx.outputs["package"]
    folder.mkdir()
    for part in ("library", "weights", "source"):
        for path in sorted(ctx.inputs[part].iterdir()):
            os.link(path, folder / path.name)
        pause()
    files = [{"path": path.name, "size": path.stat().st_size, "sha256": ctx.digest(path)}
             for path in sorted(folder.iterdir())]
    keys = {name: json.loads(path.read_text())["key"] for name, path in ctx.inputs.items() if name.startswith("made-")}
    (folder / "manifest.json").write_text(json.dumps({"variant": ctx.params["name"], "files": files, "keys": keys}))
'''
VERIFY = '''"""verify: a fake, which reads the whole package."""
from tasks.shared.prelude import *

def make_actions(plan):
    for build in plan.builds:
        yield Action("verify", build.id, __name__, {"name": build.id}, {"manifest": build.package / "manifest.json"},
                     {"record": build.package / "record.json"}, after=(f"package:{build.id}",))

def run(ctx):
    begin("verify", ctx.params["name"])
    for file in json.loads(ctx.inputs["manifest"].read_text())["files"]:
        data = (ctx.inputs["manifest"].parent / file["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"], file["path"]
    ctx.outputs["record"].write_text(json.dumps({
        "quality": {"kl": 0.0, "top1": 1.0}, "speed": {"decode": 1.0}, "random": False,
        "reply": {"prompt": "", "text": ""},
    }))
'''


def make_project(root: Path) -> Path:
    """Write the project's files below `root`; its default build makes both variants."""
    small_project.make_project(root)
    (root / "recipes/matrices/default.yaml").write_text(
        "axes: {model: [m], quantization: [q0, q4], target: [x86-64-v3]}\n"
    )
    (root / "tasks/shared/prelude.py").write_text(PRELUDE)
    steps = {"download": DOWNLOAD, "convert": CONVERT, "compile": COMPILE, "package": PACKAGE, "verify": VERIFY}
    for name, text in steps.items():
        (root / "tasks" / f"{name}.py").write_text(text)
    return root


def load_package(folder: Path) -> dict[str, str] | None:
    """Contents of a finished package by file name, as digests, None if it has no manifest.

    AssertionError when it is not what its manifest says.
    """
    if not (folder / "manifest.json").exists():
        return None
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    for file in manifest["files"]:
        assert found[file["path"]] == file["sha256"], f"{folder.name}: {file['path']}"
    return found


def load_artifacts(root: Path) -> dict[str, str]:
    """Digests of all that is built, by path: what a clean build must have made as well."""
    found = [path for path in sorted((root / "artifacts").rglob("*")) if path.is_file()]
    names = {path.relative_to(root / "artifacts"): path for path in found}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if name.parts[0] not in (".graph", "store")
    }
