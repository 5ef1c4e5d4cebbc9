"""How fast the build graph is: a made-up matrix of 1,000 variants (5,100 tasks), beside ninja, make and snakemake.

    .venv/bin/python ci/bench_graph.py [--models 100] [--rounds 5]

All tools get the same graph: the same tasks with the same inputs and outputs, as small files. Those that are not on
PATH are left out. Figures are of whole processes, the interpreter's start included: medians of interleaved rounds, as
wall time, and as CPU time, which says more where other programs run beside.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from mlcbuild.graph.digest import DigestMemo

ROOT = Path(__file__).resolve().parents[1]
QUANTIZATIONS, TARGETS = 5, 2
# With the first, which some containers set, every start of Python would compile our modules anew.
NOT_USUAL = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
MODEL = """family: llama
source: {{path: {name}}}
licence: Apache-2.0
config: {{model_type: llama, vocab_size: 8}}
limits: {{context_window: 8}}
"""
STEP = '''"""{step}: writes one small file."""
from pathlib import Path

from mlcbuild.graph.action import Action

OUT = Path("artifacts/{step}")


def make_actions(plan):
    for build in plan.builds:
        name = {name}
        yield Action("{step}", name, __name__, {params}, {inputs}, {outputs}, tools=("numpy",), after=({after}))


def run(ctx):
    {run}
'''
ONE_FILE = 'next(iter(ctx.outputs.values())).write_text("".join(p.read_text() for p in ctx.inputs.values())[:99] + "x")'
PACKAGE = """import json

    (ctx.outputs["package"]).mkdir()
    (ctx.outputs["package"] / "manifest.json").write_text(json.dumps({"files": [{"size": 1}]}))"""
VERIFY = """import json

    record = {"quality": {"kl": 0, "top1": 1}, "speed": {"decode": 1}, "reply": {"prompt": "", "text": ""}}
    ctx.outputs["record"].write_text(json.dumps({**record, "random": False}))"""
# step: name, parameters, inputs, outputs, after, run
STEPS = {
    "download": (
        "build.model.name",
        "{}",
        '{"source": Path("recipes/models") / build.model.name / "weights.txt"}',
        '{"file": OUT / f"{name}.txt"}',
        "",
        ONE_FILE,
    ),
    "convert": (
        "build.id",
        '{"bits": build.quantization.bits}',
        '{"file": Path("artifacts/download") / f"{build.model.name}.txt"}',
        '{"file": OUT / f"{name}.txt"}',
        '"download:" + build.model.name,',
        ONE_FILE,
    ),
    "compile": (
        "build.id",
        '{"config": build.model.config, "bits": build.quantization.bits, "tvm": build.target.tvm}',
        "{}",
        '{"file": OUT / f"{name}.txt"}',
        "",
        ONE_FILE,
    ),
    "package": (
        "build.id",
        "{}",
        '{"weights": Path(f"artifacts/convert/{name}.txt"), "library": Path(f"artifacts/compile/{name}.txt")}',
        '{"package": build.package}',
        '"convert:" + name, "compile:" + name',
        PACKAGE,
    ),
    "evaluate": (
        "build.id",
        "{}",
        '{"manifest": build.package / "manifest.json"}',
        '{"file": OUT / f"{name}.txt"}',
        '"package:" + name,',
        ONE_FILE,
    ),
    "verify": (
        "build.id",
        "{}",
        '{"manifest": build.package / "manifest.json", "scores": Path(f"artifacts/evaluate/{name}.txt")}',
        '{"record": build.package / "record.json"}',
        '"evaluate:" + name,',
        VERIFY,
    ),
}


def make_project(root: Path, models: int) -> None:
    """A project of ours below `root`."""
    files = {
        "matrices/default.yaml": "axes: {model: [m000], quantization: [q1], target: [t0]}\n",
        "matrices/nightly.yaml": 'axes: {model: ["m*"], quantization: ["*"], target: ["*"]}\n',
    }
    for number in range(models):
        name = f"m{number:03}"
        files[f"models/{name}.yaml"] = MODEL.format(name=name)
        files[f"models/{name}/weights.txt"] = f"{number}\n"
    for number in range(1, QUANTIZATIONS + 1):
        files[f"quantizations/q{number}.yaml"] = f"method: group\nbits: {number}\ngroup_size: 32\ndtype: float16\n"
    for number in range(TARGETS):
        tvm = f"{{kind: llvm, opt-level: {number}}}"
        files[f"targets/t{number}.yaml"] = f"kind: cpu\narch: {platform.machine()}\ntvm: {tvm}\nlayouts: [rows16]\n"
    files = {f"recipes/{name}": text for name, text in files.items()}
    for step, (name, params, inputs, outputs, after, run) in STEPS.items():
        values = {"name": name, "params": params, "inputs": inputs, "outputs": outputs, "after": after, "run": run}
        files[f"tasks/{step}.py"] = STEP.format(step=step, **values)
    files |= {name: (ROOT / name).read_text("utf-8") for name in ("tasks/build.py", "tasks/explain.py", "dodo.py")}
    files |= {"tasks/__init__.py": '"""tasks"""\n', "pyproject.toml": (ROOT / "pyproject.toml").read_text("utf-8")}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
        os.utime(root / name, (1_700_000_000, 1_700_000_000))  # as in a checkout that was not made just now


def list_edges(models: int) -> Iterator[tuple[str, list[str]]]:
    """The same graph as (output, inputs)."""
    for model in (f"m{number:03}" for number in range(models)):
        yield f"download/{model}", [f"source/{model}"]
        for quantization in range(1, QUANTIZATIONS + 1):
            for target in range(TARGETS):
                name = f"{model}-q{quantization}-t{target}"
                yield f"convert/{name}", [f"download/{model}"]
                yield f"compile/{name}", [f"source/{model}.recipe"]
                yield f"package/{name}", [f"convert/{name}", f"compile/{name}"]
                yield f"evaluate/{name}", [f"package/{name}"]
                yield f"verify/{name}", [f"package/{name}", f"evaluate/{name}"]


SNAKEFILE = """
M, Q, T = [f"m{{i:03}}" for i in range({models})], range(1, {quantizations} + 1), range({targets})
rule all:
    input: expand("verify/{{m}}-q{{q}}-t{{t}}", m=M, q=Q, t=T)
rule download:
    input: "source/{{m}}"
    output: "download/{{m,m[0-9]+}}"
    shell: "cat {{input}} > {{output}}"
rule convert:
    input: "download/{{m}}"
    output: "convert/{{m}}-{{v}}"
    shell: "cat {{input}} > {{output}}"
rule compile:
    input: "source/{{m}}.recipe"
    output: "compile/{{m}}-{{v}}"
    shell: "cat {{input}} > {{output}}"
rule package:
    input: "convert/{{n}}", "compile/{{n}}"
    output: "package/{{n}}"
    shell: "cat {{input}} > {{output}}"
rule evaluate:
    input: "package/{{n}}"
    output: "evaluate/{{n}}"
    shell: "cat {{input}} > {{output}}"
rule verify:
    input: "package/{{n}}", "evaluate/{{n}}"
    output: "verify/{{n}}"
    shell: "cat {{input}} > {{output}}"
"""


def make_files_of_others(root: Path, models: int) -> None:
    """The graph for ninja, make and snakemake below `root`."""
    edges = list(list_edges(models))
    ninja = ["rule step\n  command = cat $in > $out\n"]
    ninja += [f"build {output}: step {' '.join(inputs)}" for output, inputs in edges]
    make = [f"all: {' '.join(output for output, _ in edges if output.startswith('verify/'))}"]
    make += [f"{output}: {' '.join(inputs)}\n\tcat $^ > $@" for output, inputs in edges]
    for folder in {output.partition("/")[0] for output, _ in edges} | {"source"}:
        (root / folder).mkdir(parents=True)
    for number in range(models):
        for end in ("", ".recipe"):
            path = root / "source" / f"m{number:03}{end}"
            path.write_text("x\n")
            os.utime(path, (1_700_000_000, 1_700_000_000))
    (root / "build.ninja").write_text("\n".join(ninja) + "\n")
    (root / "Makefile").write_text("\n".join(make) + "\n")
    (root / "Snakefile").write_text(
        SNAKEFILE.format(models=models, quantizations=QUANTIZATIONS, targets=TARGETS), "utf-8"
    )


def run(command: list[str], folder: Path, **environment: str) -> tuple[float, float, str]:
    """Wall and CPU seconds of a command, and what it printed. It must succeed."""
    settings = {name: value for name, value in os.environ.items() if name not in NOT_USUAL}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=folder, env={**settings, **environment}, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.stdout + done.stderr


def doit(*args: str) -> list[str]:
    """Our command line in this environment."""
    return [sys.executable, str(Path(sys.executable).with_name("doit")), *args]


def list_cases(ours: Path, small: Path, one: Path, others: Path) -> dict[str, Callable[[], tuple[float, float, str]]]:
    """What is measured, by name; each call is one round."""
    count = iter(range(1_000_000))

    def change() -> tuple[float, float, str]:
        """One model's recipe is edited: its ten variants have to be compiled and all that comes after."""
        recipe = ours / "recipes/models/m001.yaml"
        recipe.write_text(MODEL.format(name="m001").replace("vocab_size: 8", f"vocab_size: {next(count) + 9}"))
        found = run(doit("explain", "matrix=nightly"), ours)
        assert ", 40 run" in found[2], found[2][-500:]
        return found

    def restore() -> tuple[float, float, str]:
        for step in ("packages", *STEPS):
            shutil.rmtree(small / "artifacts" / step, ignore_errors=True)
        found = run(doit("build", "matrix=nightly"), small)
        assert found[2].count("\nhit ") >= 400, found[2][-500:]
        return found

    cases = {
        "mlcbuild: nothing to do, 1 variant": lambda: run(doit("build"), one),
        "mlcbuild: nothing to do": lambda: run(doit("build", "matrix=nightly"), ours),
        "mlcbuild: plan, 1 recipe edited": change,
        "mlcbuild: restore 408 artifacts": restore,
    }
    tools = {
        "ninja": ["ninja"],
        "make": ["make"],
        "snakemake": ["snakemake", "-c1", "--quiet", "--rerun-triggers", "mtime"],
    }
    for name, command in tools.items():
        if shutil.which(command[0]) is None:
            continue
        run(command, others)  # ninja makes the files; the others then have nothing to do
        cases[f"{name}: nothing to do"] = lambda command=command: run(command, others)
        cases[f"{name}: plan, 1 input edited"] = lambda command=command: plan_others(command, others)
    return cases


def plan_others(command: list[str], others: Path) -> tuple[float, float, str]:
    """A dry run after an input has changed, which is put back."""
    path = others / "source/m001.recipe"
    os.utime(path)
    try:
        return run([*command, "-n"], others)
    finally:
        os.utime(path, (1_700_000_000, 1_700_000_000))


def measure_hashing(folder: Path) -> tuple[float, float]:
    """GB per second of CPU time at which a file is hashed, and the seconds that a second look takes."""
    path = folder / "large.bin"
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20) * 8)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    memo = DigestMemo(folder / "memo")
    seconds = []
    for _ in range(2):
        started = time.process_time()
        memo.get_file_digest(path)
        seconds.append(time.process_time() - started)
    return path.stat().st_size / seconds[0] / 1e9, seconds[1]


def main() -> None:
    """Make the projects, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=100, help="of 10 variants and 51 tasks each (100)")
    parser.add_argument("--rounds", type=int, default=5, help="of every case (5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ours, small, one, others = (Path(scratch) / name for name in ("ours", "small", "one", "others"))
        make_project(ours, options.models)
        make_project(small, 8)
        make_project(one, 1)
        make_files_of_others(others, options.models)
        print("building everything once ...", file=sys.stderr)
        run(doit("build", "matrix=nightly"), ours)
        run(doit("build", "matrix=nightly"), small)
        run(doit("build"), one)
        cases, found = list_cases(ours, small, one, others), defaultdict(list)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, case in cases.items():
                found[name].append(case()[:2])
            run(doit("build", "matrix=nightly"), ours)  # what the edited recipe asks for
        rate, again = measure_hashing(Path(scratch))
    print(f"| {options.models * QUANTIZATIONS * TARGETS} variants, {options.models * 51} tasks | wall, s | CPU, s |")
    print("|---|---|---|")
    for name, times in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {wall:.3f} | {cpu:.3f} |")
    print(f"| hashing: {rate:.2f} GB/s; the same file again | | {again:.6f} |")


if __name__ == "__main__":
    main()
