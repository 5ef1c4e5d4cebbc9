"""`doit tune`: how a value is judged, the search, the file, and the command itself; no time is looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from real_project import copy_project, doit

from engine.machine import get_cpu_features
from mlcbuild.compiler.kernels.knobs import load_knobs
from mlcbuild.errors import UnknownNameError
from mlcbuild.quality.tuning import Case, Ratio, Trial, Tuner, Values, compare, make_ratio, turned
from mlcbuild.quality.tuning_file import format_tuning, load_lines, write_tuning
from mlcbuild.recipes.load import load_recipes
from tasks.tune import format_trial, list_wanted

ROOT = Path(__file__).parents[2]
NOISE = [0.01, -0.02, 0.015, -0.01, 0.02, -0.015, 0.0]


@pytest.mark.parametrize(
    ("ratios", "better"),
    [
        ([0.9 + x for x in NOISE * 3], True),
        ([0.98 + x for x in NOISE], False),  # no more than the noise of seven rounds
        ([0.98 + x for x in NOISE * 9], True),  # but than that of many
        ([0.995] * 99, False),  # certain, and too little
        ([1.0 + x for x in NOISE * 9], False),
        ([0.9] * 6 + [3.0], True),  # a round that somebody disturbed
    ],
)
def test_what_is_better(ratios, better):
    assert make_ratio(ratios).is_better is better


def test_a_ratio_is_the_median_with_its_error():
    ratio = make_ratio([0.9, 0.92, 0.94, 1.5])
    assert ratio.median == pytest.approx(0.93)
    assert ratio.error == pytest.approx(1.2533 * 1.4826 * 0.02 / 2)


def test_every_value_comes_first_and_last():
    orders = [turned((1, 2, 3), turn) for turn in range(6)]
    assert orders == [[1, 2, 3], [3, 2, 1], [2, 3, 1], [1, 3, 2], [3, 1, 2], [2, 1, 3]]
    for place in range(3):
        assert sorted(order[place] for order in orders) == [1, 1, 2, 2, 3, 3]


def test_quantizations_and_rows_count_alike_and_matrices_by_their_calls():
    cases = [Case({}, 10, 0, ("q4", 1)), Case({}, 1, 0, ("q4", 1)), Case({}, 10, 0, ("q8", 1))]
    seconds = [{1: 1.0, 2: 0.5}, {1: 10.0, 2: 15.0}, {1: 100.0, 2: 50.0}]
    assert compare(cases, seconds, 2, 1) == pytest.approx(((5 + 15) / 20 + 0.5) / 2)
    assert compare(cases, seconds, 1, 1) == 1


def make_tuner(monkeypatch, target: str) -> Tuner:
    """One that has not looked at the machine, and has no time to do without."""
    monkeypatch.setattr(Tuner, "__post_init__", lambda self: None)
    recipes = load_recipes(ROOT / "recipes")
    quantizations = [recipes.quantizations[name] for name in ("q4f16_1", "q8f16_1")]
    tuner = Tuner(recipes.targets[target], recipes.models["tiny"].config, quantizations, 7, 60, lambda text: None)
    tuner.end = 1e18
    return tuner


def run(monkeypatch, times: Mapping[str, Mapping[int, float]], *, end: float = 1e18, values: Values | None = None):
    """Trials, the tuner, and what was measured, where a knob's values take these times, whatever the others are.

    Knobs of the same number of rows share their matrices.
    """
    names = []

    def measure(self, name, cases, choices, current):
        names.append(name)
        mine = times[name.partition(",")[0].partition(".")[2]]
        return {value: Ratio(mine[value] / mine[current], 0.001) for value in choices}, 0.9

    def list_felt(self, kernel, knob):
        matrix = SimpleNamespace(name=f"o, {knob.split('_')[1]}")
        return [(SimpleNamespace(name=knob[:5]), kernel, matrix)] if knob in times else []

    tuner = make_tuner(monkeypatch, "x86-64-v4-vnni")
    tuner.end, tuner.values = end, values or {}
    monkeypatch.setattr(Tuner, "make_cases", lambda *args: [])
    monkeypatch.setattr(Tuner, "measure", measure)
    monkeypatch.setattr(Tuner, "list_felt", list_felt)
    return list(tuner.run([("linear_vnni", knob) for knob in load_knobs()["linear_vnni"]])), tuner, names


def flat(knob: str, **changes: float) -> dict[int, float]:
    return {c: changes.get(f"at{c}", 1.0) for c in load_knobs()["linear_vnni"][knob].choices}


def test_the_default_stays_where_nothing_is_better(monkeypatch):
    trials, tuner, names = run(monkeypatch, {"bits4_rows1_ahead": flat("bits4_rows1_ahead", at4=0.995, at28=1.3)})
    assert [(trial.knob, trial.chosen, trial.confirmed) for trial in trials] == [("bits4_rows1_ahead", 8, None)]
    assert tuner.values == {"linear_vnni": {"bits4_rows1_ahead": 8}}
    assert names == ["linear_vnni.bits4_rows1_ahead"]


def test_the_best_is_measured_again_and_then_what_shares_its_matrices(monkeypatch):
    times = {
        "bits4_rows1_blocks": flat("bits4_rows1_blocks"),
        "bits4_rows1_ahead": flat("bits4_rows1_ahead", at12=0.97, at16=0.9),
        "bits4_rows2_ahead": flat("bits4_rows2_ahead"),
    }
    trials, tuner, names = run(monkeypatch, times)
    start = "linear_vnni.bits4_rows"
    first = [f"{start}1_blocks", f"{start}1_ahead", f"{start}1_ahead, 16 again", f"{start}2_ahead"]
    assert names == [*first, f"{start}1_blocks"]
    assert trials[1].confirmed is not None
    assert tuner.values["linear_vnni"]["bits4_rows1_ahead"] == 16


def test_what_the_tuning_says_is_what_others_are_compared_with(monkeypatch):
    times, values = flat("bits4_rows1_ahead", at28=0.5), {"linear_vnni": {"bits4_rows1_ahead": 28}}
    [trial], tuner, _ = run(monkeypatch, {"bits4_rows1_ahead": times}, values=values)
    assert (trial.current, trial.chosen) == (28, 28)
    assert tuner.values == {"linear_vnni": {"bits4_rows1_ahead": 28}}


def test_a_value_that_is_better_once_is_not_taken(monkeypatch):
    def measure(self, name, cases, choices, current):
        fast = 1.0 if "again" in name else 0.9
        return {value: Ratio(fast if value == 16 else 1.0, 0.001) for value in choices}, 0.9

    monkeypatch.setattr(Tuner, "make_cases", lambda *args: [])
    monkeypatch.setattr(Tuner, "measure", measure)
    trial = make_tuner(monkeypatch, "x86-64-v3").try_knob("linear_vnni", "bits4_rows1_ahead", [])
    assert trial.chosen == 8
    assert trial.confirmed == Ratio(1.0, 0.001)
    assert format_trial(trial).endswith("(error 0.001): 16 not confirmed, 1.000 again")


def test_what_the_time_does_not_suffice_for_is_named(monkeypatch):
    """What the target's matrices do not feel is not missed."""
    times = {knob: flat(knob) for knob in ("bits4_rows1_ahead", "bits8_rows1_ahead")}
    trials, tuner, names = run(monkeypatch, times, end=0)
    assert (trials, names, tuner.values) == ([], [], {})
    assert tuner.left_out == ["linear_vnni.bits4_rows1_ahead", "linear_vnni.bits8_rows1_ahead"]


def make_trial(knob: str, current: int, chosen: int, **ratios: float) -> Trial:
    found = {int(name[2:]): Ratio(value, 0.004) for name, value in ratios.items()}
    return Trial("linear_dot", knob, current, found, 0.912, chosen, Ratio(0.951, 0.002) if chosen != current else None)


def test_a_line_of_the_report():
    assert format_trial(make_trial("bits4_ahead", 20, 28, at8=1.234, at20=1.0, at28=0.95)) == (
        "linear_dot.bits4_ahead           0.91 of read  8 1.234  20 now  28 0.950  (error 0.004): 28 taken, 0.951 again"
    )
    assert format_trial(make_trial("bits4_ahead", 20, 20, at8=1.2, at20=1.0)).endswith("(error 0.004): 20 stays")


def test_a_file_keeps_the_lines_of_what_was_not_measured(tmp_path):
    (tmp_path / "tunings").mkdir()
    path = tmp_path / "tunings" / "a.yaml"
    path.write_text(
        "# lost\ndescription: old\nkernels:\n  linear_dot:\n    bits8_ahead: 16  # kept\n    bits4_ahead: 20 # lost\n"
        "  linear_rows16: {ahead: 4096}\n"
    )
    assert load_lines(path) == {
        ("linear_dot", "bits8_ahead"): "bits8_ahead: 16  # kept",
        ("linear_dot", "bits4_ahead"): "bits4_ahead: 20 # lost",
    }
    trial = make_trial("bits4_ahead", 20, 28, at8=1.2, at20=1.0, at28=0.96)
    values = {"linear_rows16": {"ahead": 4096}, "linear_dot": {"bits4_ahead": 28, "bits8_ahead": 16}}
    write_tuning(path, format_tuning("Measured on a: b", values, [trial], load_lines(path)))
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../schema/tunings.json\n# Written by ./doit tune")
    assert text.endswith(
        "description: 'Measured on a: b'\nkernels:\n  linear_dot:\n"
        "    bits4_ahead: 28  # 8 +25.0%, 20 +4.2%, +-0.4%\n    bits8_ahead: 16  # kept\n"
        "  linear_rows16:\n    ahead: 4096\n"
    )
    assert load_recipes(tmp_path).tunings["a"].kernels == values
    assert [file.name for file in path.parent.iterdir()] == ["a.yaml"]
    assert load_lines(tmp_path / "none.yaml") == {}


def test_what_kernel_names():
    assert list_wanted("linear_dot") == [("linear_dot", "bits4_ahead"), ("linear_dot", "bits8_ahead")]
    assert list_wanted("*.bits4_ahead, linear_dot") == list_wanted("linear_dot")
    assert len(list_wanted("*")) == sum(len(knobs) for knobs in load_knobs().values())
    with pytest.raises(UnknownNameError) as caught:
        list_wanted("linear_dott")
    assert str(caught.value).startswith(
        "kernel=linear_dott: no kernel or knob is called so\n  hint: did you mean linear_dot"
    )


def test_knobs_are_felt_where_they_change_the_code(monkeypatch):
    """For a processor with VNNI: its own matmul and the gated one, at the knob's bits and rows; the other's not."""
    tuner = make_tuner(monkeypatch, "x86-64-v4-vnni")
    found = {(q.name, file, b.name) for q, file, b in tuner.list_felt("linear_vnni", "bits4_rows2_ahead")}
    plain = {("q4f16_1", "linear_vnni", f"{name}, 2 rows") for name in ("qkv", "o", "down", "logits")}
    assert found == plain | {("q4f16_1", "linear_gated", "gate_up, 2 rows")}
    assert tuner.list_felt("linear_dot", "bits4_ahead") == []


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("tuned"))


@pytest.mark.skipif("avx2" not in (get_cpu_features() or ()), reason="this processor has no AVX2")
def test_the_command_writes_a_file_that_is_used(project, tmp_path):
    args = ("tune", "model=tiny", "quantization=q4f16_1", "target=x86-64-v3", "kernel=linear_dot", "rounds=1")
    done = doit(project, tmp_path, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("x86-64-v3: matrices of tiny, q4f16_1")
    assert [line.split()[0] for line in lines[1:-2]] == ["linear_dot.bits4_ahead"]
    assert lines[-2] == "written to recipes/tunings/x86-64-v3.yaml"
    assert "the next build compiles what is for x86-64-v3" in lines[-1]
    knobs = load_recipes(project / "recipes").targets["x86-64-v3"].knobs
    assert knobs["linear_dot"]["bits4_ahead"] in load_knobs()["linear_dot"]["bits4_ahead"].choices


@pytest.mark.skipif("avx2" not in (get_cpu_features() or ()), reason="this processor has no AVX2")
def test_an_interrupted_search_writes_nothing(project, tmp_path):
    before = {path: path.read_bytes() for path in (project / "recipes/tunings").iterdir()}
    command = [sys.executable, "-m", "doit", "tune", "model=tiny", "target=x86-64-v3", "rounds=1000000"]
    environment = {**os.environ, "PYTHONPATH": str(project), "MLCBUILD_STORE": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("linear_dot.bits4_ahead: compile")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert out.endswith("ended before the end: no file was written\n")
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in (project / "recipes/tunings").iterdir()} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("target=cuda-sm90",), "tune is for CPUs, and target cuda-sm90 is not one\n  hint: doit tune target=cpu"),
        (("target=x86-64-v3,aarch64",), "tune works on one target, and the variables select 2: x86-64-v3, aarch64"),
        (("target=aarch64",), "this machine cannot run target aarch64 (it has no asimd), so cannot time it"),
        (("target=x86-64-v3", "kernel=nonsense"), "kernel=nonsense: no kernel or knob is called so"),
        (
            ("target=x86-64-v3", "model=tiny", "kernel=linear_vnni"),
            "kernel=linear_vnni: the matmuls of x86-64-v3 with q4f16_1, q8f16_1 have no such knob",
        ),
        (("target=x86-64-v3", "model=tiny", "minutes=0.000001"), "the time was over before a knob was measured"),
        (("target=x86-64-v3", "rounds=none"), "rounds=none is not a positive number"),
    ],
)
def test_mistakes(project, tmp_path, args, message):
    before = sorted((project / "recipes/tunings").iterdir())
    done = doit(project, tmp_path, "tune", *args)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted((project / "recipes/tunings").iterdir()) == before
