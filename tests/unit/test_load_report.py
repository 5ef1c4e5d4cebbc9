"""What a load test asks and says: datasets, arrival times, percentiles, goodput; nothing is sent here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.datasets import Prompt, Wanted, load_prompts, set_arrivals
from engine.bench.load import Sample
from engine.bench.load_report import Slo, compute_percentile, make_lines, make_report, write_csv
from engine.errors import InvalidSetting


def make_sample(number: int, arrivals: tuple[float, ...], seconds: float, **fields: object) -> Sample:
    given = {"start": float(number), "late": 0.0, "prompt_tokens": 10, "cached_tokens": 4, "counted": True}
    given |= {"generated": len(arrivals), "finish": "stop", "error": None, **fields}
    return Sample(number=number, arrivals=arrivals, seconds=seconds, **given)  # type: ignore[arg-type]


def test_random_prompts_share_nothing_and_come_again() -> None:
    wanted = Wanted(requests=50, input=40, output=7, seed=3)
    prompts = load_prompts(wanted)
    assert prompts == load_prompts(wanted) != load_prompts(Wanted(requests=50, input=40, output=7, seed=4))
    assert {(len(prompt.text.split()), prompt.max_tokens, prompt.at) for prompt in prompts} == {(40, 7, None)}
    assert len({" ".join(prompt.text.split()[:4]) for prompt in prompts}) == 50
    assert len(load_prompts(Wanted())) == 100


def test_shared_prefixes_are_shared_and_no_more() -> None:
    prompts = load_prompts(Wanted("shared-prefix", requests=20, input=10, prefix=100))
    words = [prompt.text.split() for prompt in prompts]
    assert {tuple(found[:100]) for found in words} == {tuple(words[0][:100])}
    assert len({tuple(found[100:]) for found in words}) == 20
    assert {len(found) for found in words} == {110}


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    turns = [("human", "Why?"), ("gpt", "Because of the rain in May."), ("human", "And?"), ("gpt", "No.")]
    whole = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    unusable = [{}, {"conversations": "no"}, {"conversations": [{"from": "human", "value": "Alone"}]}, 7]
    system = {"conversations": [{"from": "system", "value": "Be kind."}, *whole["conversations"]]}
    path.write_text(json.dumps([*unusable, whole, system]))
    assert load_prompts(Wanted(str(path))) == [Prompt("Why?", 8)] * 2
    assert load_prompts(Wanted(str(path), requests=1, output=5)) == [Prompt("Why?", 5)]
    for requests, text, message in [
        (3, path.read_text(), "2 conversations begin with a question and a reply\n  hint: requests=2"),
        (None, "[]", '0 conversations begin with a question and a reply\n  hint: [{"conversations": '),
        (None, "{", "not JSON: "),
    ]:
        path.write_text(text)
        with pytest.raises(InvalidSetting) as caught:
            load_prompts(Wanted(str(path), requests=requests))
        assert str(caught.value).startswith(f"{path}: {message}")


def test_a_trace_is_replayed_by_its_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at, "prompt": text, "max_tokens": 9} for at, text in ((7.5, "c"), (5, "a"), (5.25, "b"))]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert load_prompts(Wanted(str(path))) == [Prompt("a", 9, 0.0), Prompt("b", 9, 0.25), Prompt("c", 9, 2.5)]
    assert load_prompts(Wanted(str(path), requests=1, output=3)) == [Prompt("a", 3, 0.0)]
    for line, message in [
        ("{", ":1: not JSON: "),
        ('{"prompt": "a", "max_tokens": 1}', ":1: timestamp is not a number of seconds\n  hint: {"),
        ('{"timestamp": NaN, "prompt": "a", "max_tokens": 1}', ":1: timestamp is not a number of seconds"),
        ('{"timestamp": 0, "prompt": "", "max_tokens": 1}', ":1: prompt is not a text"),
        ('{"timestamp": 0, "prompt": "a", "max_tokens": true}', ":1: max_tokens is not a positive whole number"),
        ("\n", ": has 0 lines\n  hint: requests=..."),
    ]:
        path.write_text(line)
        with pytest.raises(InvalidSetting) as caught:
            load_prompts(Wanted(str(path)))
        assert str(caught.value).startswith(f"{path}{message}")


def test_datasets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting) as caught:
        load_prompts(Wanted("randm"))
    kinds = "random or shared-prefix or <file>.json or <file>.jsonl"
    assert str(caught.value) == f"there is no dataset 'randm'\n  hint: dataset={kinds}"
    with pytest.raises(InvalidSetting, match="no.json: cannot be read: No such file or directory"):
        load_prompts(Wanted(str(tmp_path / "no.json")))


def test_poisson_arrivals() -> None:
    prompts = set_arrivals([Prompt("a", 1)] * 4000, 8.0, 5)
    times = [prompt.at or 0.0 for prompt in prompts]
    gaps = np.diff(times)
    assert times[0] == 0
    assert np.mean(gaps) == pytest.approx(1 / 8, rel=0.06)  # four standard errors
    assert np.std(gaps) == pytest.approx(1 / 8, rel=0.1)  # an exponential's is its mean


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert compute_percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_a_report() -> None:
    samples = [
        make_sample(0, (0.1, 0.2, 0.4), 0.5, generated=5),
        make_sample(1, (0.3,), 0.4),
        make_sample(2, (), 0.2, finish="length"),
        make_sample(3, (0.1,), 9.0, error="HTTP 500: no"),
    ]
    report = make_report(samples, Slo(ttft=200.0, tpot=80.0))
    assert json.loads(json.dumps(report)) == report
    assert (report["requests"], report["ok"], report["failed"], report["empty"]) == (4, 3, 1, 1)
    assert report["errors"] == {"HTTP 500: no": 1}
    assert report["seconds"] == 12.0
    assert report["tokens"] == {"prompt": 30, "cached": 12, "generated": 6, "without_usage": 0}
    assert report["total_tokens_per_s"] == 3.0
    assert report["ttft_ms"] == {
        name: pytest.approx(v) for name, v in zip(report["ttft_ms"], (200, 200, 280, 298, 300), strict=True)
    }
    assert report["tpot_ms"]["p50"] == pytest.approx(75)
    assert report["itl_ms"]["p50"] == pytest.approx(150)
    assert report["e2e_ms"]["p99"] == pytest.approx(498)
    assert report["goodput"] == {"requests": 1, "share": 0.25, "requests_per_s": pytest.approx(1 / 12)}
    lines = make_lines(report)
    assert "3 of 4 requests ok, 1 failed, 12.0 s" in lines
    assert "goodput at TTFT <= 200 ms, TPOT <= 80 ms: 0.08 requests/s (1 requests, 25.0%)" in lines
    assert "1 replies had no text" in lines
    assert lines[-1] == "failed 1 times: HTTP 500: no"


def test_a_report_of_failures_alone() -> None:
    report = make_report([make_sample(0, (), 1.0, error="x", prompt_tokens=None, counted=False)], Slo())
    assert (report["ok"], report["ttft_ms"], report["goodput"]["requests"]) == (0, None, 0)
    assert all(math.isfinite(report[name]) for name in ("requests_per_s", "total_tokens_per_s"))


def test_the_csv_has_a_line_for_each_request(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.csv"
    write_csv(path, [make_sample(0, (0.1, 0.3), 0.5), make_sample(1, (), 1.0, error="cut, off")])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1"]
    assert (rows[0]["ttft_ms"], rows[0]["tpot_ms"], rows[0]["e2e_ms"]) == ("100.000", "200.000", "500.000")
    assert (rows[1]["ttft_ms"], rows[1]["error"]) == ("", "cut, off")
