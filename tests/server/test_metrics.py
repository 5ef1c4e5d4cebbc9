"""/metrics: every series that is promised, with numbers that fit what was asked, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import time

import httpx
import pytest
from fake_models import ROOT
from prometheus_client.parser import text_string_to_metric_families
from running import Running, run_fake_server, wait_until

PATH = "/v1/chat/completions"
HISTOGRAMS = ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"]
HISTOGRAMS += ["request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"]
HISTOGRAMS += ["request_prompt_tokens", "request_generation_tokens", "grammar_compile_seconds"]
COUNTERS = ["prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "requests"]
COUNTERS += ["requests_rejected", "requests_aborted", "preemptions", "spec_draft_tokens", "spec_accepted_tokens"]
COUNTERS += ["tool_call_parse_failures", "grammar_compile_failures", "model_seconds"]
GAUGES = ["requests_running", "requests_waiting", "kv_cache_usage_ratio", "models_loaded", "engine_up", "build_info"]


def read(running: Running) -> dict[str, float]:
    """name{label=value,...} -> value, without model_name, which every series has."""
    answer = httpx.get(running.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "fake"
            text = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            values[f"{sample.name}{{{text}}}".removeprefix("mlcbuild_").replace("{}", "")] = sample.value
    return values


def ask(running: Running, text: str, path: str = PATH, patience: float = 30, **fields: object) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
    return httpx.post(running.url + path, json=body, timeout=patience)


def test_the_numbers() -> None:
    with run_fake_server() as running:
        before, began = read(running), time.monotonic()
        assert (before["requests_running"], before["engine_up"], before["kv_cache_usage_ratio"]) == (0, 1, 0)
        whole = ask(running, "hi").json()["usage"]
        ask(running, "slow", max_tokens=10)
        ask(running, "hi", "/v1/messages", max_tokens=50)
        ask(running, "unusable")
        assert ask(running, "hi", top_p=5).status_code == 400
        assert httpx.get(running.url + "/nothing").status_code == 404
        with pytest.raises(httpx.ReadTimeout):
            ask(running, "slow", patience=0.3)
        wait_until(lambda: running.model.engine.get_stats().running == 0)
        after = read(running)
    assert after["requests_total{finish_reason=stop,route=/v1/chat/completions}"] == 1
    assert after["requests_total{finish_reason=length,route=/v1/chat/completions}"] == 1
    assert after["requests_total{finish_reason=stop,route=/v1/messages}"] == 1
    assert after["requests_total{finish_reason=error,route=/v1/chat/completions}"] == 1
    assert after["requests_total{finish_reason=abort,route=/v1/chat/completions}"] == 1
    assert after["requests_aborted_total"] == 1
    assert after["requests_rejected_total{reason=invalid}"] == 1
    assert after["requests_rejected_total{reason=not_found}"] == 1
    count = whole["completion_tokens"]
    assert after["request_generation_tokens_sum"] == 2 * count + 10
    assert after["inter_token_latency_seconds_count"] >= 2 * (count - 1) + 9
    assert 9 * 0.02 < after["request_decode_time_seconds_sum"] < time.monotonic() - began
    assert after["e2e_request_latency_seconds_sum"] == pytest.approx(
        after["time_to_first_token_seconds_sum"] + after["request_decode_time_seconds_sum"]
    )
    # The one that failed was in the queue, and had no token.
    assert after["request_queue_time_seconds_count"] == after["time_to_first_token_seconds_count"] + 1
    until_first = after["request_queue_time_seconds_sum"] + after["request_prefill_time_seconds_sum"]
    assert 0 < after["time_to_first_token_seconds_sum"] < until_first
    assert after["generation_tokens_total"] > 2 * count + 10
    assert 9 * 0.02 < after["model_seconds_total"] < time.monotonic() - began
    assert after["prefix_cache_hits_total"] <= after["prefix_cache_queries_total"] == after["prompt_tokens_total"]
    assert (after["requests_running"], after["requests_waiting"]) == (0, 0)
    assert any(name.startswith("build_info{artifact=fake/none/here,target=here,version=") for name in after)


def test_what_is_promised_and_drawn(server: Running) -> None:
    ask(server, "hi")
    ask(server, "hi", top_p=5)
    names = {name.partition("{")[0] for name in read(server)}
    assert {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")} <= names
    assert {*GAUGES, *(f"{name}_total" for name in COUNTERS)} <= names
    dashboard = json.loads((ROOT / "engine" / "server" / "grafana.json").read_text())
    drawn = set(re.findall(r"mlcbuild_(\w+)", json.dumps(dashboard["panels"])))
    assert drawn <= names
    unseen = {*(f"{name}_bucket" for name in HISTOGRAMS), *(f"{name}_total" for name in COUNTERS)} - drawn
    assert unseen == set()


def test_grammars_and_broken_calls() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    with run_fake_server() as running:
        call = 'say <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        for _ in range(2):  # the second finds its grammar in the cache
            assert ask(running, call, tools=[tool]).json()["choices"][0]["finish_reason"] == "tool_calls"
        assert ask(running, call, tools=[tool], max_tokens=8).json()["choices"][0]["finish_reason"] == "length"
        assert ask(running, "hi", grammar="start: (").status_code == 400
        values = read(running)
    assert values["grammar_compile_seconds_count"] == 2
    assert values["grammar_compile_failures_total"] == 1
    assert values["tool_call_parse_failures_total{format=hermes}"] == 1
