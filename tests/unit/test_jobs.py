"""A matrix as CI jobs: every variant once, in balance, downloads shared; and the output as a CI service reads it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlcbuild.errors import UnknownNameError
from mlcbuild.recipes.jobs import Item, cut_evenly, format_jobs, make_item, make_shards
from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.matrix import Variant, make_variants

ROOT = Path(__file__).parents[2]
RECIPES = load_recipes(ROOT / "recipes")
NIGHTLY = make_variants(RECIPES, {"matrix": "nightly"})


def doit(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "doit", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def select(arguments: str) -> list[Variant]:
    """What a job's `./doit build ARGUMENTS` would build."""
    return make_variants(RECIPES, dict(word.split("=", 1) for word in shlex.split(arguments)))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 256])
def test_each_variant_is_in_one_shard(count: int) -> None:
    shards = make_shards(RECIPES, NIGHTLY, count)
    assert 0 < len(shards) <= count
    assert sorted(v.id for shard in shards for v in shard.variants) == sorted(v.id for v in NIGHTLY)
    for shard in shards:
        assert shard.variants
        wanted = {name for v in shard.variants for name in RECIPES.targets[v.target].toolchain}
        assert set(shard.toolchain) == wanted


def test_without_a_number_each_checkpoint_is_fetched_once() -> None:
    shards = make_shards(RECIPES, NIGHTLY, None)
    assert sorted(shard.models for shard in shards) == sorted((name,) for name in {v.model for v in NIGHTLY})


def test_models_of_one_checkpoint_count_as_one(tmp_path: Path) -> None:
    items = [make_item(RECIPES, Variant(name, "q4f16_1", "aarch64")) for name in ("llama3.2-1b", "llama3.2-1b", "tiny")]
    assert items[0].checkpoint == items[1].checkpoint != items[2].checkpoint
    assert items[0].fetch > 0 == items[2].fetch


lines = st.lists(
    st.tuples(st.integers(0, 4), st.floats(1, 100)),
    min_size=1,
    max_size=40,
).map(
    lambda rows: [
        Item(Variant("m", str(number), "t"), f"c{checkpoint}", 50.0, make)
        for number, (checkpoint, make) in enumerate(sorted(rows))
    ]
)


@given(items=lines, count=st.integers(1, 20))
def test_pieces_are_even_and_fetch_little(items: list[Item], count: int) -> None:
    pieces = cut_evenly(items, count)
    assert [item for piece in pieces for item in piece] == items
    assert len(pieces) <= count
    costs = [sum(i.make for i in piece) + 50.0 * len({i.checkpoint for i in piece}) for piece in pieces]
    total = sum(item.make for item in items) + 50.0 * len({item.checkpoint for item in items})
    dearest = max(item.make + item.fetch for item in items)
    assert max(costs) <= total / count + dearest + 50.0 + 1e-3
    fetched = sum(len({item.checkpoint for item in piece}) for piece in pieces)
    assert fetched <= len({item.checkpoint for item in items}) + len(pieces) - 1


def test_github_reads_one_line_of_json() -> None:
    """`strategy.matrix` takes `include`, at most 256 objects of strings; `$GITHUB_OUTPUT` takes one line."""
    done = doit("matrix", "name=nightly", "format=github", "shards=5")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    include = json.loads(done.stdout)["include"]
    assert [job["shard"] for job in include] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all(isinstance(value, str) for job in include for value in job.values())
    built = [variant for job in include for variant in select(job["arguments"])]
    assert sorted(v.id for v in built) == sorted(v.id for v in NIGHTLY)
    assert sorted(set(built), key=str) == sorted(NIGHTLY, key=str)  # with the overrides of the matrix
    many = json.loads(format_jobs("github", "nightly", make_shards(RECIPES, NIGHTLY * 9, 256)))
    assert len(many["include"]) <= 256


def test_gitlab_reads_a_child_pipeline() -> None:
    done = doit("matrix", "name=nightly", "format=gitlab", "shards=3", "target=cuda*")
    assert (done.returncode, done.stderr) == (0, "")
    pipeline = yaml.safe_load(done.stdout)
    for included in pipeline.pop("include"):
        pipeline = {**yaml.safe_load((ROOT / included["local"]).read_text("utf-8")), **pipeline}
    jobs = {name: job for name, job in pipeline.items() if job.get("extends") == ".build"}
    assert [name.split(":")[0] for name in jobs] == ["build 1/3", "build 2/3", "build 3/3"]
    assert all("$ARGUMENTS" in line for line in pipeline[".build"]["script"])
    built = [v.id for job in jobs.values() for v in select(job["variables"]["ARGUMENTS"])]
    assert sorted(built) == sorted(v.id for v in NIGHTLY if v.target.startswith("cuda"))
    assert all(set(job["variables"]) == set(pipeline[".build"]["variables"]) for job in jobs.values())
    assert {job["variables"]["TOOLCHAIN"] for job in jobs.values()} == {"cc nvcc"}


def test_the_example_workflows_call_what_there_is() -> None:
    """Every `./doit` of ci/*.yml: options that `doit build` has, and a matrix that can be printed."""
    github = yaml.safe_load((ROOT / "ci" / "github.yml").read_text("utf-8"))
    gitlab = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text("utf-8"))
    runs = [step["run"] for job in github["jobs"].values() for step in job["steps"] if "run" in step]
    text = "\n".join([*runs, *gitlab[".build"]["script"], *gitlab["plan"]["script"]])
    commands = re.findall(r"\./doit (build|matrix) ([^\n)>]*)", text)
    assert sorted(name for name, _ in commands) == ["build", "build", "matrix", "matrix"]
    known = doit("help", "build").stdout
    keys = json.loads(format_jobs("github", "nightly", make_shards(RECIPES, NIGHTLY, 1)))["include"][0]
    assert set(re.findall(r"matrix\.(\w+)", str(github["jobs"]["build"]))) == set(keys)
    for name, arguments in commands:
        if name == "matrix":
            done = doit(name, *shlex.split(arguments))
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout
        else:
            assert all(option in known for option in re.findall(r"--\w+", arguments))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "doit matrix needs a format\n  hint: format=github or format=gitlab"),
        (["format=jenkins"], "unknown format 'jenkins'\n  hint: known: github, gitlab"),
        (["format=github", "shards=0"], "shards=0: a matrix has 1 to 256 jobs\n  hint: shards=256"),
        (["format=github", "shards=257"], "shards=257: a matrix has 1 to 256 jobs\n  hint: shards=256"),
        (["format=github", "shards=few"], "shards=few is not a number\n  hint: shards=16"),
        (["format=github", "name=nightley"], "unknown matrix 'nightley'\n  hint: did you mean nightly?"),
        (["format=github", "shard=3"], "unknown variable 'shard'\n  hint: did you mean shards?"),
        (["nightly"], "doit matrix takes variables, not nightly\n  hint: doit matrix --help"),
    ],
)
def test_mistakes(args: list[str], text: str) -> None:
    done = doit("matrix", *args)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")


def test_help() -> None:
    done = doit("matrix", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "matrix [name=nightly] format=github|gitlab [shards=N]" in text
    assert "shards (1 to 256) is how many jobs there may be" in text


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(UnknownNameError):
        make_shards(RECIPES, NIGHTLY, 1000)
