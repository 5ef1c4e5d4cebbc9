"""bench-serve: load any server that speaks OpenAI's chat protocol, and say how fast and how steady it answers.

    ./doit bench-serve url=http://127.0.0.1:8000 concurrency=8 requests=100 input=128 output=64
    ./doit bench-serve rate=4 slo_ttft=500 slo_tpot=50            # Poisson arrivals, goodput under an SLO
    ./doit bench-serve dataset=shared-prefix prefix=512
    ./doit bench-serve dataset=sharegpt.json    ./doit bench-serve dataset=trace.jsonl

It ends with a line of JSON, and with exit 1 when no request succeeded; the CSV has a line for each request.
Nothing is built. Load only servers that are yours. ci/bench_servers.py loads ours and llama.cpp's in turns.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.server.settings import split_list
from mlcbuild.errors import MlcbuildError
from mlcbuild.graph.plan import call, get_plan
from mlcbuild.graph.settings import VARIABLES as EVERYWHERE
from mlcbuild.recipes.names import check_name

if TYPE_CHECKING:
    from engine.bench.datasets import Prompt, Wanted
    from engine.bench.load import Endpoint
    from engine.bench.load_report import Slo

VARIABLES = {
    "url": "the server, http://127.0.0.1:8000; /v1 is added to an address without a path",
    "model_name": "what the server calls the model (or model=, where it is a recipe's name); default: its only one",
    "api_key": "key of the server; better in the environment, as MLCBUILD_API_KEY",
    "dataset": "random, shared-prefix, a ShareGPT file (.json) or a trace (.jsonl), random",
    "requests": "how many, 100; of a trace all",
    "concurrency": "requests under way at once, 8",
    "rate": "or else requests a second at random times (Poisson), however many are under way",
    "input": "words of a random prompt, about a token each, 128",
    "output": "tokens of a reply at most, 64; with a file: as there",
    "prefix": "words that all prompts of shared-prefix begin with, 512",
    "ignore_eos": "1 = replies of exactly `output` tokens, where the server knows this field; 0",
    "temperature": "of the sampling, 0 = greedy; default: what the server does by itself",
    "warmup": "random requests sent before, not counted, 2",
    "seed": "of prompts and arrival times, 0",
    "timeout": "seconds after which a reply has failed, 600",
    "slo_ttft": "milliseconds to the first token that a good reply keeps to",
    "slo_tpot": "milliseconds for each token after the first that a good reply keeps to",
    "csv": "file with a line for each request, artifacts/reports/bench-serve.csv",
    "plot": "picture of the times, .svg or .png; needs MLCBUILD_EXTRAS=plot; default: none",
}
SAMPLE = "./doit bench-serve concurrency=8 requests=100 input=128 output=64"
# Variables that mean something with some datasets only; a trace says when to send.
USERS = {
    "input": ("random", "shared-prefix"),
    "prefix": ("shared-prefix",),
    "rate": ("random", "shared-prefix", ".json"),
    "concurrency": ("random", "shared-prefix", ".json"),
}


def task_bench_serve() -> dict[str, Any]:
    """load an OpenAI-compatible server and measure it"""
    return {
        "basename": "bench-serve",
        "actions": [(run_task, [dict(get_plan().variables)])],
        "uptodate": [False],
        "verbosity": 2,
        "io": {"capture": False},
    }


def run_task(variables: dict[str, str]) -> Any:
    """doit's action: exit 1 without another word after the report when no request succeeded."""
    from doit.exceptions import TaskFailed

    reports: list[dict[str, Any]] = []
    if (failure := call(run_bench_serve, variables, reports)) is not None:
        return failure
    return None if reports[0]["ok"] else TaskFailed("no request succeeded", report=False)


def run_bench_serve(variables: Mapping[str, str], reports: list[dict[str, Any]]) -> None:
    """Load the server, print the figures, write the CSV, and append the report to `reports`."""
    from rich.console import Console

    from engine.bench.load import read_model_seconds, run_load
    from engine.bench.load_report import make_lines, make_report, make_table, write_csv
    from engine.bench.plot import check_plot, write_plot

    check_variables(variables)
    plot = Path(variables["plot"]) if "plot" in variables else None
    if plot is not None:
        check_plot(plot)
    prompts, warmup, concurrency = make_requests(variables)
    slo = make_slo(variables)
    endpoint = make_endpoint(variables)
    with Console(stderr=True).status("warm-up") as line:
        run_load(endpoint, warmup, concurrency)
        total, before = len(prompts), read_model_seconds(endpoint)
        line.update(f"0 of {total}")
        samples = run_load(endpoint, prompts, concurrency, lambda n, bad: line.update(f"{n} of {total}, {bad} failed"))
    dataset = variables.get("dataset", "random")
    about = {"url": endpoint.url, "model": endpoint.model, "dataset": dataset}
    pace = {"rate": get_number(variables, "rate"), "concurrency": None if prompts[0].at is not None else concurrency}
    after = read_model_seconds(endpoint)
    seconds = None if before is None or after is None else after - before
    report = {**about, **pace, **make_report(samples, slo, seconds)}
    path = Path(variables.get("csv", "artifacts/reports/bench-serve.csv"))
    write_csv(path, samples)
    title = f"{endpoint.model} at {endpoint.url}, {dataset}"
    if plot is not None:
        write_plot(plot, samples, title)
    console = Console()
    console.print(make_table(report, title))
    for text in [*make_lines(report), f"written to {' and '.join(map(str, filter(None, (path, plot))))}"]:
        console.print(text, markup=False, highlight=False)
    print(json.dumps(report), flush=True)
    reports.append(report)


def check_variables(variables: Mapping[str, str]) -> None:
    """Refuse what this task, or this dataset, would not look at. Raises UnknownNameError, MlcbuildError."""
    for name in variables:
        check_name("variable", name, [*VARIABLES, "model", *EVERYWHERE])
    dataset = variables.get("dataset", "random")
    kind = dataset if dataset in ("random", "shared-prefix") else Path(dataset).suffix
    for name, users in USERS.items():
        if name in variables and kind not in users:
            raise MlcbuildError(f"{name}= means nothing with dataset={dataset}", hint=f"leave {name}= out")
    if "rate" in variables and "concurrency" in variables:
        raise MlcbuildError("rate= and concurrency= exclude each other", hint="leave one out")


def make_requests(variables: Mapping[str, str]) -> tuple[list[Prompt], list[Prompt], int]:
    """The prompts, those of the warm-up, and how many clients send them."""
    from engine.bench.datasets import Wanted, load_prompts, set_arrivals

    base = Wanted()
    wanted = Wanted(
        dataset=variables.get("dataset", base.dataset),
        requests=get_count(variables, "requests"),
        input=get_count(variables, "input") or base.input,
        output=get_count(variables, "output"),
        prefix=get_count(variables, "prefix") or base.prefix,
        seed=get_count(variables, "seed", least=0) or 0,
    )
    prompts = load_prompts(wanted)
    if (rate := get_number(variables, "rate")) is not None:
        prompts = set_arrivals(prompts, rate, wanted.seed)
    count = get_count(variables, "warmup", least=0)
    return prompts, make_warmup(wanted, 2 if count is None else count), get_count(variables, "concurrency") or 8


def make_warmup(wanted: Wanted, count: int) -> list[Prompt]:
    """Random prompts that the load does not hold, so that none of it is cached."""
    from engine.bench.datasets import make_random

    return make_random(replace(wanted, requests=count, seed=wanted.seed + 1_000_003)) if count else []


def make_endpoint(variables: Mapping[str, str]) -> Endpoint:
    """The server, asked for its model when none is given. Raises ServerUnusable, InvalidSetting."""
    from engine.bench.load import Endpoint, find_model, make_url

    url = make_url(variables.get("url", "http://127.0.0.1:8000"))
    keys = split_list(variables.get("api_key", os.environ.get("MLCBUILD_API_KEY", "")))
    key = keys[0] if keys else ""
    exact = variables.get("ignore_eos", "0")
    if exact not in ("0", "1"):
        raise MlcbuildError(f"ignore_eos={exact} is neither 0 nor 1", hint=SAMPLE)
    timeout, temperature = get_number(variables, "timeout") or 600.0, get_number(variables, "temperature", least=0.0)
    model = variables.get("model_name") or variables.get("model") or find_model(url, key)
    return Endpoint(url, model, key, timeout, exact == "1", temperature)


def make_slo(variables: Mapping[str, str]) -> Slo:
    """What a good reply keeps to."""
    from engine.bench.load_report import Slo

    return Slo(get_number(variables, "slo_ttft"), get_number(variables, "slo_tpot"))


def get_count(variables: Mapping[str, str], name: str, least: int = 1) -> int | None:
    """A whole number that is `least` or more; None when it is not given. Raises MlcbuildError."""
    if name not in variables:
        return None
    text = variables[name]
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise MlcbuildError(f"{name}={text} is not a whole number from {least} on", hint=SAMPLE)
    return int(text)


def get_number(variables: Mapping[str, str], name: str, least: float | None = None) -> float | None:
    """A number above 0, or from `least` on; None when it is not given. Raises MlcbuildError."""
    if name not in variables:
        return None
    try:
        value = float(variables[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        wanted = "above 0" if least is None else f"from {least:g} on"
        raise MlcbuildError(f"{name}={variables[name]} is not a number {wanted}", hint="./doit bench-serve rate=4")
    return value
