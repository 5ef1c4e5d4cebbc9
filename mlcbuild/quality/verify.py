"""Opens a package as a user would, compares it with the unquantized model, lets it answer, and times it.

What was found goes into record.json beside the package's manifest; the gate of the model recipe decides whether the
package counts as built. The record is a measurement: it names a date and a processor, so it is not part of the
package's digest.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.artifact import Package, open_package
from mlcbuild.errors import QualityError
from mlcbuild.quality.gate import check_gate
from mlcbuild.quality.measure import compute_divergence, compute_perplexity, list_measured_rows
from mlcbuild.quality.reference import ReferenceData, load_reference
from mlcbuild.quality.references import Report
from mlcbuild.quality.speed import measure_package_speed
from mlcbuild.quality.windows import compute_log_probs

if TYPE_CHECKING:
    from engine.runtime.executor import Executor
    from mlcbuild.recipes.schema import Gate

RECORD_SCHEMA = 1
DEFAULT_PROMPT = "What is the capital of France?"
REPLY_TOKENS = 64


def make_tvm_executor(package: Package) -> Executor:
    """The executor that users get."""
    from engine.runtime.tvm_executor import TvmExecutor

    executor: Executor = TvmExecutor(package)
    return executor


def verify_package(
    package: Path,
    reference: Path,
    gate: Gate | None,
    destination: Path,
    report: Report,
    *,
    prompt: str = DEFAULT_PROMPT,
    make_executor: Callable[[Package], Executor] = make_tvm_executor,
) -> dict[str, Any]:
    """Measure the package in folder `package` and write the record to the file `destination`; returns the record.

    `reference` is the folder that compute_reference wrote for the same model; `gate` is not applied to random weights,
    whose predictions are almost a tie between all tokens. Raises PackageInvalid for a package that cannot be opened,
    QualityError for one that fails the gate (nothing is written then) or does not belong to the reference.
    """
    report("check the package", 0.0)
    opened = open_package(package, verify=True)
    data = load_reference(reference)
    executor = make_executor(opened)
    try:
        report("compare with the reference", 0.1)
        quality = measure_quality(executor, data, opened, lambda text, part=None: report(text, 0.1 + 0.5 * (part or 0)))
        report("time it", 0.6)
        speed = measure_package_speed(executor, lambda text, part=None: report(text, 0.6 + 0.3 * (part or 0)))
        report("ask it a question", 0.9)
        text = make_reply(opened, executor, prompt)
    finally:
        executor.close()
    others = measure_other_libraries(opened, data, make_executor, report)
    record: dict[str, Any] = {
        "schema": RECORD_SCHEMA,
        "variant": opened.manifest.variant,
        "random": opened.manifest.random,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "size": sum(file.size for file in opened.manifest.files),
        "quality": quality,
        "other_libraries": others,
        "gate": gate.model_dump(mode="json") if gate and not opened.manifest.random else None,
        "speed": speed,
        "reply": {"prompt": prompt, "text": text},
    }
    record = {key: round_figures(value) for key, value in record.items()}
    for figures in (quality, *others.values()):
        check_gate({**record, "quality": figures}, None if opened.manifest.random else gate)
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def measure_other_libraries(
    package: Package, data: ReferenceData, make_executor: Callable[[Package], Executor], report: Report
) -> dict[str, Any]:
    """The quality, by file name, of the libraries that the engine would pick on lesser processors."""
    found = {}
    for library in package.libraries[1:]:
        report(f"compare {library.name} with the reference", 0.95)
        executor = make_executor(replace(package, libraries=(library,)))
        try:
            found[library.name] = measure_quality(executor, data, package, lambda *_: None)
        finally:
            executor.close()
    return found


def measure_quality(executor: Executor, data: ReferenceData, package: Package, report: Report) -> dict[str, Any]:
    """KL (nats per token: mean and largest), top-1 agreement, both perplexities, tokens compared.

    Windows longer than the package's context are cut to it.
    """
    vocabulary, limits = data.log_probs.shape[1], executor.limits
    if vocabulary != limits.vocab_size:
        raise QualityError(
            f"{package.root}: the package has {limits.vocab_size} tokens, its reference {vocabulary}",
            hint=f"make the reference again: doit reference:{package.manifest.variant.split('/')[0]}",
        )
    windows, reference = cut_windows(data, limits.max_length)
    found = compute_log_probs(executor, windows, report)
    measured = list_measured_rows([len(window) for window in windows])
    if not np.isfinite(found).all():
        raise QualityError(
            f"{package.root}: the package predicts values that are not numbers",
            hint="its weights or its library are broken: build them again, and report it if that does not help",
        )
    divergence = compute_divergence(reference[measured], found[measured])
    return {
        "kl": divergence.kl,
        "kl_max": divergence.kl_max,
        "top1": divergence.top1,
        "perplexity": compute_perplexity(found, windows),
        "reference_perplexity": compute_perplexity(reference, windows),
        "tokens": len(measured),
    }


def cut_windows(data: ReferenceData, longest: int) -> tuple[list[NDArray[np.int32]], NDArray[np.float32]]:
    """Windows of at most `longest` tokens, and the reference's rows for them."""
    starts = np.cumsum([0, *data.lengths[:-1]])
    kept = [np.arange(start, start + min(n, longest)) for start, n in zip(starts, data.lengths, strict=True)]
    return [window[:longest] for window in data.windows], data.log_probs[np.concatenate(kept)]


def make_reply(package: Package, executor: Executor, prompt: str, tokens: int = REPLY_TOKENS) -> str:
    """The greedy reply to `prompt`, of at most `tokens` tokens, through the engine's own loop.

    Without a chat template the prompt is continued as plain text. Raises the engine's error if the request ends in one.
    """
    from engine.core import Request, SamplingParams
    from engine.engine import Engine
    from engine.request import check_request
    from engine.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(package.root)
    if tokenizer.template is None:
        prompted = tokenizer.encode(prompt)
    else:
        prompted = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    engine = Engine(executor, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=tokens)
    request = Request("verify", tuple(prompted), params, time.monotonic())
    check_request(request, engine.limits)
    engine.add(request)
    text = ""
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            text += output.text
    return text


def round_figures(value: Any) -> Any:
    """The same data with floats of five digits: more would only say that two runs differ."""
    if isinstance(value, dict):
        return {key: round_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_figures(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value
