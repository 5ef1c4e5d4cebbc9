"""tune: measure the kernels' knobs on this machine and write them into the target's tuning.

    ./doit tune target=cpu                                              # every knob that the target's matmuls have
    ./doit tune target=x86-64-v3 kernel=linear_dot quantization=q4f16_1 minutes=5
    ./doit tune target=cpu kernel=linear_vnni.bits4_rows1_* rounds=41   # some knobs, more exactly

A kernel's file declares its knobs with their choices (KNOBS in mlcbuild/compiler/kernels/). All values of one take
turns on the model's matrices, on one thread in CPU time, with weights from memory. One is taken if it is faster than
the current value by at least a hundredth and by more than three standard errors of the median of the rounds, twice.
The file, recipes/tunings/<name>.yaml, is part of the keys of the libraries that have it: what it changes, and nothing
else, is compiled again. It is written at the end, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError, UnknownNameError
from mlcbuild.graph.plan import Plan, call, get_plan
from mlcbuild.recipes.names import get_nearest
from tasks.bench import get_count, get_minutes, show_progress

if TYPE_CHECKING:
    from mlcbuild.quality.tuning import Trial
    from mlcbuild.recipes.schema import Quantization, Target

VARIABLES = {
    "kernel": "which, as a comma list or globs of kernels or of their knobs (linear_dot.bits4_*); *",
    "rounds": "rounds of every value, 21",
    "minutes": "that it may take, 20; knobs for which they do not suffice are named and keep their values",
}
ALONE = True
MODEL = "llama3.2-1b"  # whose shape it is, if model= does not say
QUANTIZATIONS = ("q4f16_1", "q8f16_1")  # likewise


def task_tune() -> dict[str, Any]:
    """measure the kernels' knobs on this machine, write recipes/tunings/"""
    return {"actions": [(call, [run_tune])], "uptodate": [False], "verbosity": 2, "io": {"capture": False}}


def run_tune() -> None:
    """Measure, print a line for each knob, write the file."""
    os.environ["TVM_NUM_THREADS"] = "1"  # read once, when TVM makes its threads

    from mlcbuild.compiler.build import hand_on_interrupts
    from mlcbuild.quality.tuning import Tuner

    plan = get_plan()
    target, quantizations = choose_target(plan), choose_quantizations(plan)
    model = plan.selected[0].model if "model" in plan.variables else plan.recipes.models[MODEL]
    wanted = list_wanted(plan.variables.get("kernel", "*"))
    rounds, seconds = get_count(plan.variables, "rounds", 21), 60 * get_minutes(plan.variables, 20)
    names = ", ".join(q.name for q in quantizations)
    print(f"{target.name}: matrices of {model.name}, {names}; a thread's CPU time beside that of the current value")
    trials: list[Trial] = []
    hand_on_interrupts()
    try:
        with show_progress() as report:
            tuner = Tuner(target, model.config, quantizations, rounds, seconds, report)
            for trial in tuner.run(wanted):
                trials.append(trial)
                print(format_trial(trial), flush=True)
    except KeyboardInterrupt:
        print("ended before the end: no file was written", flush=True)
        raise
    for name in tuner.left_out:
        print(f"left out: {name}: the time was over; minutes={2 * seconds / 60:g} gives it more")
    if not trials:
        which = plan.variables.get("kernel", "*")
        if tuner.left_out:
            raise MlcbuildError("the time was over before a knob was measured", hint="give it more minutes=")
        raise UnknownNameError(
            f"kernel={which}: the matmuls of {target.name} with {names} have no such knob",
            hint="name another kernel or quantization: doit help tune",
        )
    save(plan, target, trials, tuner.values)


def choose_target(plan: Plan) -> Target:
    """The only one that the variables select. UnknownNameError where it cannot be measured here."""
    from mlcbuild.recipes.machine import load_cpu_flags

    targets = {build.target.name: build.target for build in plan.selected}
    if len(targets) != 1:
        raise UnknownNameError(
            f"tune works on one target, and the variables select {len(targets)}: {', '.join(targets)}",
            hint="doit tune target=cpu",
        )
    [target] = targets.values()
    if target.kind != "cpu":
        raise UnknownNameError(f"tune is for CPUs, and target {target.name} is not one", hint="doit tune target=cpu")
    if not plan.selected[0].runs_here:
        lacking = [flag for flag in target.requires if flag not in load_cpu_flags()]
        raise UnknownNameError(
            f"this machine cannot run target {target.name} (it has no {', '.join(lacking)}), so cannot time it",
            hint="tune it on one that can, or another: doit tune target=cpu",
        )
    return target


def choose_quantizations(plan: Plan) -> list[Quantization]:
    """Those that the variables name, else QUANTIZATIONS."""
    if "quantization" in plan.variables:
        return list({build.quantization.name: build.quantization for build in plan.selected}.values())
    return [plan.recipes.quantizations[name] for name in QUANTIZATIONS]


def list_wanted(patterns: str) -> list[tuple[str, str]]:
    """(kernel, knob) of what `kernel=` names. UnknownNameError for a part of it that fits nothing."""
    from mlcbuild.compiler.kernels.knobs import load_knobs

    known = [(kernel, knob) for kernel, knobs in load_knobs().items() for knob in knobs]
    found: list[tuple[str, str]] = []
    for pattern in (part.strip() for part in patterns.split(",")):
        fitting = [pair for pair in known if fnmatchcase(pair[0], pattern) or fnmatchcase(".".join(pair), pattern)]
        if not fitting:
            names = [*load_knobs(), *map(".".join, known)]
            nearest = get_nearest(pattern, names)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(load_knobs())}"
            raise UnknownNameError(f"kernel={pattern}: no kernel or knob is called so", hint=hint)
        found += [pair for pair in fitting if pair not in found]
    return found


def format_trial(trial: Trial) -> str:
    """A line: what the values cost, and what became of it."""
    tried = ["now" if value == trial.current else f"{r.median:.3f}" for value, r in trial.ratios.items()]
    costs = "  ".join(f"{value} {text}" for value, text in zip(trial.ratios, tried, strict=True))
    noise = max(ratio.error for ratio in trial.ratios.values())
    outcome = f"{trial.current} stays"
    if trial.confirmed is not None:
        which = "taken" if trial.chosen != trial.current else "not confirmed"
        best = min(trial.ratios, key=lambda value: trial.ratios[value].median)
        outcome = f"{best} {which}, {trial.confirmed.median:.3f} again"
    name = f"{trial.kernel}.{trial.knob}"
    return f"{name:32} {trial.of_read:4.2f} of read  {costs}  (error {noise:.3f}): {outcome}"


def save(plan: Plan, target: Target, trials: list[Trial], values: Mapping[str, Mapping[str, int]]) -> None:
    """Write the tuning and say what it changes."""
    from mlcbuild.quality.speed import find_cpu_name
    from mlcbuild.quality.tuning_file import format_tuning, load_lines, write_tuning

    name = target.tuning or target.name
    path = plan.root / "recipes" / "tunings" / f"{name}.yaml"
    ordered = {kernel: dict(sorted(knobs.items())) for kernel, knobs in values.items()}
    write_tuning(path, format_tuning(f"Measured on {find_cpu_name()}", ordered, trials, load_lines(path)))
    print(f"written to {path.relative_to(plan.root)}")
    if values == target.knobs:
        print("no value is another, so nothing is compiled again")
        return
    sharing = [other for other in plan.recipes.targets if (plan.recipes.targets[other].tuning or other) == name]
    print(f"the next build compiles what is for {', '.join(sharing)} again: doit explain target={','.join(sharing)}")
