"""Metrics for Prometheus, under the names that dashboards for vLLM read, and some of our own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .engine import Engine
from .observer import Observer
from .response_store import ResponseStore
from .streams import Stream

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


class Metrics(Observer):
    """Counts what the engine tells. Each has its own registry, so that several can live in one process."""

    def __init__(self, model: str) -> None:
        self.registry, self._model = CollectorRegistry(), model
        self._latency = self._histogram("e2e_request_latency_seconds", "from submission to the end", _SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "from submission to the first token", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "between two tokens", _TOKEN_SECONDS)
        self._queued = self._histogram("request_queue_time_seconds", "in the queue", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "from the queue to the first token", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "from the first token to the last", _SECONDS)
        self._step = self._histogram("step_seconds", "of one decode step", _TOKEN_SECONDS, "megalodon")
        self._prompt = self._counter("prompt_tokens", "tokens of prompts")
        self._generated = self._counter("generation_tokens", "tokens generated")
        self._queries = self._counter("prefix_cache_queries", "tokens of prompts that were looked up")
        self._hits = self._counter("prefix_cache_hits", "tokens of prompts that were not fed")
        self._fed = self._counter("fed_tokens", "tokens of prompts that were fed", "megalodon")
        names = ["model_name", "finished_reason"]
        self._success = Counter("vllm:request_success", "Streams that ended.", names, registry=self.registry)

    def watch(self, engine: Engine, responses: ResponseStore) -> None:
        """Report what an engine and a store hold, whenever somebody asks."""
        self.registry.register(_State(self._model, engine, responses))

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)

    def fed(self, tokens: int) -> None:
        """A piece of a prompt was fed."""
        self._fed.inc(tokens)

    def stepped(self, rows: int, seconds: float) -> None:
        """A step has fed one token to each of `rows` streams."""
        self._step.observe(seconds)

    def chosen(self, stream: Stream, before: float) -> None:
        """A stream has got a token."""
        self._generated.inc()
        if before:
            self._between.observe(stream.times.last_token - before)
        else:
            self._first.observe(stream.times.first_token - stream.times.submitted)

    def begun(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt has been fed."""
        self._prompt.inc(prompt_tokens)
        self._queries.inc(prompt_tokens)
        self._hits.inc(cached_tokens)

    def ended(self, stream: Stream, reason: str) -> None:
        """A stream is over."""
        times = stream.times
        self._success.labels(self._model, reason).inc()
        if reason not in ("stop", "length"):
            return
        self._latency.observe(times.finished - times.submitted)
        self._queued.observe(times.started - times.submitted)
        if times.first_token:
            self._prefill.observe(times.first_token - times.started)
            self._decode.observe(times.last_token - times.first_token)

    def _histogram(self, name: str, about: str, buckets: Iterable[float], family: str = "vllm") -> Histogram:
        made = Histogram(
            f"{family}:{name}", f"Seconds {about}.", ["model_name"], registry=self.registry, buckets=tuple(buckets)
        )
        return made.labels(self._model)

    def _counter(self, name: str, about: str, family: str = "vllm") -> Counter:
        about = f"{about[0].upper()}{about[1:]}."
        return Counter(f"{family}:{name}", about, ["model_name"], registry=self.registry).labels(self._model)


class _State(Collector):
    """Gauges that are read when somebody asks."""

    def __init__(self, model: str, engine: Engine, responses: ResponseStore) -> None:
        self._model, self._engine, self._responses = model, engine, responses

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges."""
        engine, store = self._engine, self._engine.store
        budget = sum(store.budgets[:2])
        for name, about, value in (
            ("vllm:num_requests_running", "Streams that run.", engine.running),
            ("vllm:num_requests_waiting", "Requests that wait.", engine.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the memory for kept states.", sum(store.used[:2]) / (budget or 1)),
            ("megalodon:kept_states", "States kept by prefix.", store.count),
            ("megalodon:kept_state_bytes_device", "Bytes of kept states on the device.", store.used[0]),
            ("megalodon:kept_state_bytes_host", "Bytes of kept states in host memory.", store.used[1]),
            ("megalodon:kept_state_bytes_disk", "Bytes of kept states on disk.", store.used[2]),
            ("megalodon:stored_responses", "Stored responses.", len(self._responses)),
            ("megalodon:stored_response_bytes", "Bytes of stored responses.", self._responses.used),
        ):
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
