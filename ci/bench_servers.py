"""How fast the server is beside llama.cpp's: the same shape, the same words, the same clients, in turns.

    ./doit build model=llama3.2-1b source=random
    MLCBUILD_EXTRAS=llama-cpp ./doit list                       # gguf, which writes the model for the other one
    .venv/bin/python ci/bench_servers.py --llama-server ~/llama.cpp/build/bin/llama-server

llama-server is built from llama.cpp's source: `cmake -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF`, then `cmake --build
build --target llama-server`. Its model has random Q4_0 weights in our shape, and our tokenizer and chat template, so
that both read and write the same number of tokens; it has a place for each client, all cores, and its own defaults
otherwise. Both servers are up all the time and are loaded in turns, each round with prompts of its own, so that no
cache helps. Replies are greedy and of full length. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

from engine.artifact import open_package
from engine.bench.datasets import Prompt
from engine.bench.load import Endpoint, find_model, read_model_seconds, run_load
from engine.bench.load_report import Slo, compute_percentile, get_gaps, get_ttft, make_report
from engine.bench.peers.llama_cpp import write_model
from engine.machine import count_cores
from engine.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 1024  # tokens that each client has room for
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "total tokens/s": lambda report: report["total_tokens_per_s"],
    "generated tokens/s": lambda report: report["generated_tokens_per_s"],
    "TTFT p50, ms": lambda report: report["ttft_ms"]["p50"],
    "TTFT p95, ms": lambda report: report["ttft_p95_ms"],
    "ITL p50, ms": lambda report: report["itl_ms"]["p50"],
    "ITL p95, ms": lambda report: report["itl_p95_ms"],
}
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PATIENCE = 120  # seconds for a server to load


def make_prompts(package: Path, count: int, length: int, output: int, seed: int) -> list[Prompt]:
    """Prompts that are exactly `length` tokens long with the chat template, one token each letter."""
    tokenizer, generator = load_tokenizer(package), random.Random(seed)
    around = len(tokenizer.encode_chat([{"role": "user", "content": ""}]))
    texts = ["".join(generator.choices(LETTERS, k=length - around)) for _ in range(count)]
    assert len(tokenizer.encode_chat([{"role": "user", "content": texts[0]}])) == length
    return [Prompt(text, output) for text in texts]


@contextlib.contextmanager
def start_ours(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """`./doit serve`, which builds what is missing: its address and its package."""
    command = [sys.executable, "-m", "doit", "serve", f"model={options.model}", "source=random", "port=0"]
    command += ["mode=server", f"kv_tokens={options.clients * CONTEXT}"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " is served at " in line), None)
        if line is None:
            raise SystemExit(f"{' '.join(command)} has ended with {process.wait()}")
        variant = line.partition("(")[2].partition(")")[0]
        yield line.split(" is served at ")[1].split(";")[0], ROOT / "artifacts/packages" / variant.replace("/", "-")
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def start_theirs(options: argparse.Namespace, package: Path) -> Iterator[str]:
    """llama-server with a model of random weights, and its address."""
    config = open_package(package).manifest.recipes["model"]["config"]
    port, cores = find_port(), str(count_cores())
    with tempfile.TemporaryDirectory(prefix="mlcbuild-peer-") as folder:
        path, log = Path(folder) / "random.gguf", Path(folder) / "log"
        write_model(config, path, package)
        command = [options.llama_server, "--model", str(path), "--port", str(port), "--jinja"]
        command += ["--threads", cores, "--threads-batch", cores, "--parallel", str(options.clients)]
        command += ["--ctx-size", str(options.clients * CONTEXT)]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield f"{url}/v1"
        finally:
            process.terminate()
            process.wait()


def find_port() -> int:
    """One that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server is healthy; SystemExit with the end of its log when it will not be."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"llama-server does not start:\n{log.read_text()[-2000:]}")


def measure(url: str, prompts: Sequence[Prompt], clients: int) -> dict[str, Any]:
    """One round: the figures that are compared, and all others."""
    endpoint = Endpoint(url, find_model(url), ignore_eos=True, temperature=0.0)
    before = read_model_seconds(endpoint)
    samples = run_load(endpoint, prompts, clients)
    after = read_model_seconds(endpoint)
    report = make_report(samples, Slo(), None if before is None or after is None else after - before)
    if report["failed"]:
        raise SystemExit(f"{url}: {report['errors']}")
    ttfts = [ttft for sample in samples if (ttft := get_ttft(sample)) is not None]
    gaps = [gap for sample in samples for gap in get_gaps(sample)]
    return {**report, "ttft_p95_ms": compute_percentile(ttfts, 95), "itl_p95_ms": compute_percentile(gaps, 95)}


def compare(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each figure the medians over the rounds, and the median of their ratios, ours to theirs."""
    found = {}
    for name, get in FIGURES.items():
        ours, theirs = ([get(one[who]) for one in rounds] for who in ("ours", "llama-server"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        medians = (statistics.median(values) for values in (ours, theirs, ratios))
        found[name] = dict(zip(("ours", "llama-server", "ratio"), medians, strict=True))
    return found


def main() -> None:
    """Load both in turns and print a Markdown table, then everything as one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-server", default="llama-server", help="the program; default: the one on PATH")
    parser.add_argument("--model", default="llama3.2-1b", help="the recipe whose shape is taken (llama3.2-1b)")
    parser.add_argument("--clients", type=int, default=8, help="at once (8)")
    parser.add_argument("--requests", type=int, default=16, help="of a round (16)")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt, its markup included (128)")
    parser.add_argument("--output", type=int, default=64, help="tokens of a reply (64)")
    parser.add_argument("--rounds", type=int, default=3, help="of each server (3)")
    options = parser.parse_args()
    if shutil.which(options.llama_server) is None:
        raise SystemExit(
            f"there is no program {options.llama_server}\n"
            "  hint: --llama-server <path>; build it from llama.cpp's source: see the head of this file"
        )
    if options.input + options.output > CONTEXT:
        raise SystemExit(f"input and output are more than {CONTEXT} tokens\n  hint: --input 128 --output 64")
    rounds: list[dict[str, dict[str, Any]]] = []
    with start_ours(options) as (ours, package), start_theirs(options, package) as theirs:
        urls = {"ours": ours, "llama-server": theirs}
        print(*(f"{who} at {url}" for who, url in urls.items()), sep=", ", file=sys.stderr)
        for number in range(options.rounds + 1):
            count = options.requests if number else options.clients  # the first round warms up
            prompts = make_prompts(package, count, options.input, options.output, seed=number)
            found = {who: measure(url, prompts, options.clients) for who, url in urls.items()}
            rounds += [found] if number else []
            print(f"round {number} of {options.rounds}", file=sys.stderr)
    table = compare(rounds)
    share = statistics.median(one["ours"]["model_share"] for one in rounds)
    print(f"| {options.clients} clients, {options.input} in / {options.output} out | ours | llama-server | ratio |")
    print("|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['ours']:.1f} | {row['llama-server']:.1f} | {row['ratio']:.2f} |")
    print(f"| our model ran, of the time | {share:.1%} | | |")
    print(json.dumps({"figures": table, "model_share": share, "rounds": rounds}))


if __name__ == "__main__":
    main()
