"""What the server counts, under vLLM's names where they apply, so that existing dashboards and routers work.

`vllm:` names carry the label model_name; per-delta series are our own (`deltaserve:`), at most MAX_DELTA_SERIES.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)
MAX_DELTA_SERIES = 200
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

GaugeReader = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]  # name, help, labels, value


class Metrics:
    """One registry a server: two servers in one process do not share counts."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "prompt tokens computed")
        self.generation_tokens = self._counter("vllm:generation_tokens", "tokens generated")
        self.preemptions = self._counter("vllm:num_preemptions", "requests put back for lack of KV blocks")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "prompt tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "prompt tokens whose KV was found there")
        self.rejections = self._counter("vllm:admission_rejections", "requests refused because the queue was full")
        self.kernel_compiles = self._counter("deltaserve:kernel_compiles", "Triton kernels compiled while serving")
        self.requests = Counter(
            "vllm:request_success",
            "requests that ended, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.time_to_first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "arrival to first token", SECONDS
        )
        self.inter_token_latency = self._histogram("vllm:inter_token_latency_seconds", "token to token", SECONDS)
        self.e2e_latency = self._histogram("vllm:e2e_request_latency_seconds", "arrival to last token", SECONDS)
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "arrival to first step", SECONDS)
        self.prefill_time = self._histogram("vllm:request_prefill_time_seconds", "first step to first token", SECONDS)
        self.decode_time = self._histogram("vllm:request_decode_time_seconds", "first token to last", SECONDS)
        self.inference_time = self._histogram("vllm:request_inference_time_seconds", "first step to last", SECONDS)
        self.request_params_n = self._histogram("vllm:request_params_n", "choices asked for", TOKENS)
        self.request_max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens asked for", TOKENS)
        self.request_prompt_tokens = self._histogram("vllm:request_prompt_tokens", "prompt tokens a request", TOKENS)
        self.request_generation_tokens = self._histogram("vllm:request_generation_tokens", "answer tokens", TOKENS)
        self.iteration_tokens = self._histogram("vllm:iteration_tokens_total", "tokens a step", TOKENS)
        self.step_seconds = self._histogram("deltaserve:step_seconds", "one forward pass and its sampling", SECONDS)
        self.delta_load_seconds = Histogram(
            "deltaserve:delta_load_seconds",
            "moves of a delta, by the tier it came from: disk to host, host to device",
            ["model_name", "tier"],
            registry=self.registry,
            buckets=SECONDS,
        )
        for tier in ("disk", "host"):
            self.delta_load_seconds.labels(model_name, tier)  # there from the start
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests, streams to their end",
            ["handler", "method"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._used: set[tuple[str, str]] = set()
        self._used_lock = threading.Lock()
        self._tenant_counters = [
            Counter(f"deltaserve:tenant_{what}", text, ["tenant", "model"], registry=self.registry)
            for what, text in (
                ("requests", "requests that ended"),
                ("prompt_tokens", "prompt tokens, as billed"),
                ("generation_tokens", "tokens generated, as billed"),
                ("cached_tokens", "of the prompt tokens, those that were found in the prefix cache"),
                ("resident_seconds", "seconds that the weights were on the device, as billed"),
            )
        ]
        self.http_requests = Counter(
            "http_requests", "HTTP requests", ["handler", "method", "status"], registry=self.registry
        )

    def used(self, tenant: str, model: str, *amounts: float) -> None:
        """One line of the bill grows: requests, prompt, generated and cached tokens, resident seconds; what is left out
        is 0. MAX_DELTA_SERIES pairs have series of their own, the rest one together."""
        pair = (tenant, model)
        with self._used_lock:
            if pair not in self._used and len(self._used) >= MAX_DELTA_SERIES:
                pair = ("other", "other")
            self._used.add(pair)
        for counter, amount in zip(self._tenant_counters, amounts, strict=False):
            counter.labels(*pair).inc(amount)

    def kernel_compiled(self, name: str) -> None:
        """Nothing should be compiled once the server is up, but where a delta is loaded."""
        self.kernel_compiles.inc()
        logger.warning("the kernel %s was compiled for a step, which waited for it", name)

    def finished(self, reason: str) -> None:
        self.requests.labels(self.model_name, reason).inc()

    def read_gauges_from(self, reader: GaugeReader) -> None:
        """`reader` is asked at every scrape."""
        self.registry.register(_Gauges(reader, self.model_name))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, ["model_name"], registry=self.registry)
        return counter.labels(self.model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
        return histogram.labels(self.model_name)


class _Gauges(Collector):
    def __init__(self, reader: GaugeReader, model_name: str) -> None:
        self._reader = reader
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._reader():
            labels = {"model_name": self._model_name, **labels}
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        yield from families.values()
