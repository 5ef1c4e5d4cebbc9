"""Prometheus metrics: what the engine holds, what its requests took, and what the server refused.

All names begin with mlcbuild_, all series carry model_name. Times are from the engine's own monotonic clock, from the
arrival of a request in the engine on. Series mean what vLLM's of the same name do.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.core import Output, Usage
from engine.model import LoadedModel

disable_created_metrics()  # type: ignore[no-untyped-call]  # gauges of no use: when each counter was made
# The beginning of a request's id says by which route it came.
ROUTES = {
    "chatcmpl": "/v1/chat/completions",
    "cmpl": "/v1/completions",
    "embd": "/v1/embeddings",
    "msg": "/v1/messages",
    "resp": "/v1/responses",
}
REASONS = {400: "invalid", 401: "unauthorized", 403: "forbidden", 404: "not_found", 408: "slow_body", 413: "too_large"}
REASONS |= {429: "overloaded", 503: "unavailable"}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """All series of one model, in a registry of their own."""

    def __init__(self, model: LoadedModel, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._latest: dict[str, float] = {}  # when each running request had its latest token
        self._name = model.name

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            family = Histogram(f"mlcbuild_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model.name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mlcbuild_{name}", text, ["model_name", *labels], registry=self.registry)

        self._requests = counter("requests", "Requests that have ended", "route", "finish_reason")
        self._rejected = counter("requests_rejected", "Requests that were refused", "reason")
        self._aborted = counter("requests_aborted", "Requests whose client left").labels(model.name)
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a reply")
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self._queued = histogram("request_queue_time_seconds", "From arrival to the first batch")
        self._prefill = histogram("request_prefill_time_seconds", "From the first batch to the first token")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last one")
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._generation = histogram("request_generation_tokens", "Tokens of a reply", TOKENS)
        self._compiling = histogram("grammar_compile_seconds", "To compile a grammar that was not in the cache")
        self._uncompiled = counter("grammar_compile_failures", "Grammars that do not compile").labels(model.name)
        broken = counter("tool_call_parse_failures", "Replies that end within a call", "format")
        self._broken = broken.labels(model.name, model.tool_format or "none")
        self.registry.register(EngineState(model))
        model.engine.watch(self.watch)
        model.engine.grammars.watch(self._watch_grammars)
        model.watch_calls(self._broken.inc)

    def _watch_grammars(self, seconds: float, compiled: bool) -> None:
        self._compiling.observe(seconds)
        if not compiled:
            self._uncompiled.inc()

    def watch(self, output: Output) -> None:
        """Take note of an Output; called in the engine's thread."""
        name, count = output.request_id, len(output.token_ids)
        if count:
            now = self._clock()
            before = self._latest.get(name)
            if before is not None:  # several tokens of one step share its time
                for _ in range(count):
                    self._itl.observe((now - before) / count)
            self._latest[name] = now
        if output.finish_reason is not None:
            self._latest.pop(name, None)
            route = ROUTES.get(name.partition("-")[0].partition("_")[0], "other")
            self._requests.labels(self._name, route, output.finish_reason).inc()
            if output.finish_reason == "abort":
                self._aborted.inc()
            else:
                self._observe(output.usage)

    def _observe(self, usage: Usage) -> None:
        self._prompt.observe(usage.prompt_tokens)
        self._generation.observe(usage.completion_tokens)
        if usage.queued is not None:
            self._queued.observe(usage.queued)
        if usage.ttft is not None:
            self._ttft.observe(usage.ttft)
            self._e2e.observe(usage.ttft + (usage.decoding or 0))
            if usage.queued is not None:
                self._prefill.observe(usage.ttft - usage.queued)
        if usage.decoding is not None:
            self._decode.observe(usage.decoding)

    def reject(self, status: int) -> None:
        """Take note of an answer that refuses a request."""
        if status in REASONS:
            self._rejected.labels(self._name, REASONS[status]).inc()


class EngineState(Collector):
    """What the engine says of itself at the moment of asking."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """One sample for each."""
        model, stats = self._model, self._model.engine.get_stats()
        used = 1 - stats.free_pages / stats.num_pages
        alive = float(model.engine.stopped is None)
        gauges = {
            "requests_running": ("Requests in the batch", stats.running),
            "requests_waiting": ("Requests in the queue", stats.waiting),
            "kv_cache_usage_ratio": ("Share of the KV cache's pages that requests have", used),
            "models_loaded": ("Models in memory", alive),
            "engine_up": ("1 while requests are taken", alive),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"mlcbuild_{name}", text, labels=["model_name"])
            gauge.add_metric([model.name], value)
            yield gauge
        counters = {
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "generation_tokens": ("Tokens that were sampled", stats.completion_tokens),
            "prefix_cache_queries": ("Tokens that were looked for in the prefix cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens that were found there", stats.cached_tokens),
            "prefix_cache_evictions": ("Pages that it had to forget", stats.evictions),
            "spec_drafts": ("Batches in which tokens of a sequence were guessed", stats.guesses),
            "spec_draft_tokens": ("Tokens that were guessed", stats.guessed_tokens),
            "spec_accepted_tokens": ("Tokens that were guessed rightly", stats.right_tokens),
            "preemptions": ("Requests that gave their pages back to be computed anew", stats.preemptions),
            "model_seconds": ("Time that the model ran; the rest of a busy time is overhead", stats.model_seconds),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"mlcbuild_{name}", text, labels=["model_name"])
            counter.add_metric([model.name], value)
            yield counter
        info = InfoMetricFamily("mlcbuild_build", "What is served", labels=["model_name"])
        version, target = importlib.metadata.version("mlcbuild"), model.variant.rpartition("/")[2]
        info.add_metric([model.name], {"version": version, "artifact": model.variant, "target": target})
        yield info


class CountRefusals:
    """ASGI middleware that counts the answers that are refusals."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the status of the answer."""

        async def look(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.reject(message["status"])
            await send(message)

        await self._app(scope, receive, look if scope["type"] == "http" else send)
